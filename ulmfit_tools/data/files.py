"""Rows of local files as a memory-mapped dataset: each is checked while it is written to the cache of `datasets`."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    Features,
    Value,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from datasets.exceptions import DatasetGenerationError

from ulmfit_tools.data.columns import require_column
from ulmfit_tools.data.readers import iterate_rows, readable
from ulmfit_tools.errors import InputError

SAMPLE_ROWS = 1000
QUIET_BYTES = 50_000_000  # smaller files are read before a progress bar could be of use
CACHE_FORMAT = "2"  # part of the cache key: raise it when the readers give something else for the same file


def sample_rows(path: Path) -> dict[str, list[Any]]:
    """The first rows of a file as column name -> values; a row that lacks a column has `None` there.

    Raises:
        InputError: The file is empty, broken or not UTF-8.
    """
    with readable(path):
        rows = [row for _, row in islice(iterate_rows(path), SAMPLE_ROWS)]
    if not rows:
        raise InputError(f"{path.name} has no rows. Give a file with at least one row a class.")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def read_files(paths: Sequence[Path], text_columns: Sequence[str], label_column: str | None) -> Dataset:
    """Reads the text columns and the label column of one split, memory-mapped.

    Args:
        paths: The file, or the shards of a split in order.
        text_columns: The columns to keep as text.
        label_column: The column to keep as label, or `None`.

    Returns:
        A dataset with the columns asked for, all of them strings.

    Raises:
        InputError: A row is broken, a text is no string, a label is missing or of another type than those before.
    """
    columns = [*text_columns, *([label_column] if label_column is not None else [])]
    key = json.dumps([CACHE_FORMAT, list(text_columns), label_column, *map(_state, paths)])
    with few_progress_bars(sum(path.stat().st_size for path in paths)):
        try:
            return Dataset.from_generator(
                _checked_rows,
                features=Features({name: Value("string") for name in columns}),
                # A tuple: `datasets` would take a list for shards.
                gen_kwargs={"paths": tuple(paths), "text_columns": tuple(text_columns), "label_column": label_column},
                fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
            )
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, InputError):
                raise error.__cause__ from None
            if isinstance(error.__cause__, UnicodeEncodeError):  # JSON can escape half a character: \ud800
                raise InputError(f"{paths[0].name} has characters that are not Unicode: {error.__cause__}") from None
            raise


def _checked_rows(
    paths: Sequence[Path], text_columns: Sequence[str], label_column: str | None
) -> Iterator[dict[str, str]]:
    columns = [*text_columns, *([label_column] if label_column is not None else [])]
    kinds: dict[str, str] = {}  # kind of label -> where it was first seen
    for path in paths:
        with readable(path):
            for number, row in iterate_rows(path, columns):
                checked = {name: _text_of(row, name, path, number) for name in text_columns}
                if label_column is not None:
                    kind, checked[label_column] = _label_of(row, label_column, path, number)
                    if kind not in kinds:
                        kinds[kind] = _place(path, number)
                        _require_one_kind(kinds, label_column)
                yield checked


def _text_of(row: dict[str, Any], name: str, path: Path, number: int) -> str:
    value = row.get(name)
    if isinstance(value, str) and not value.isspace() and value:
        return value
    where = _place(path, number)
    require_column(name, list(row), where)
    if isinstance(value, str):
        raise InputError(f'{where}: the text "{name}" is empty. Remove the row or give it a text.')
    raise InputError(f'{where}: "{name}" is not a text. Received: {_short(value)}')


def _label_of(row: dict[str, Any], name: str, path: Path, number: int) -> tuple[str, str]:
    """The kind of a label and its text: 1 and 1.0 both read as 1."""
    value = row.get(name)
    if isinstance(value, str) and value.strip():
        return "text", value.strip()
    if isinstance(value, bool):
        return "true or false", json.dumps(value)
    if isinstance(value, int):
        return "number", str(value)
    if isinstance(value, float) and value.is_integer():
        return "number", str(int(value))
    where = _place(path, number)
    require_column(name, list(row), where)
    if value is None or value != value or isinstance(value, str):
        raise InputError(f'{where}: the label "{name}" is missing. Remove the row or give it a label.')
    raise InputError(
        f'{where}: "{name}" must be one class: a text, a whole number, or true or false. Received: {_short(value)}'
    )


def _require_one_kind(kinds: dict[str, str], label_column: str) -> None:
    if len(kinds) > 1:
        seen = " and ".join(f"{kind} ({where})" for kind, where in kinds.items())
        raise InputError(f'Labels of mixed types in "{label_column}": {seen}. Write all of them as text.')


def _place(path: Path, number: int) -> str:
    return f"{path.name} {'row' if path.suffix.lower() in ('.json', '.parquet') else 'line'} {number}"


def _short(value: Any) -> str:
    return repr(value)[:60]


def _state(path: Path) -> list[Any]:
    """What changes when the file does, for the key of its cached rows."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


@contextmanager
def few_progress_bars(size: int) -> Iterator[None]:
    """Hides the progress bars of `datasets` for work on few bytes: it is done before one helps."""
    if are_progress_bars_disabled() or size > QUIET_BYTES:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
