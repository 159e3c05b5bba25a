"""Readers of the file formats: each yields numbered rows, and says in one line what is wrong with a file.

Everything that is text in a file stays text: `NA`, `null` and `123` in a CSV are ordinary strings, as a review or a
label may well read like that.
"""

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features

from ulmfit_tools.errors import InputError, nearest

EXTENSIONS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")
FASTTEXT_PREFIX = "__label__"
BATCH_ROWS = 1000


def iterate_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields `(number, row)`: the line where the row starts, or its place in a json list or Parquet file, from 1.

    Args:
        path: A file with one of the `EXTENSIONS`.
        columns: What a Parquet file need not go without reading; the other formats give all their columns.

    Raises:
        InputError: A row is broken.
        UnicodeDecodeError: A text file is not UTF-8.
    """
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path, columns)
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".json": _json_rows, ".jsonl": _json_rows, ".txt": _txt_rows}
    return readers[path.suffix.lower()](path)


def class_names(path: Path) -> dict[str, list[str]]:
    """The columns whose label names the file itself declares: Parquet files written by `datasets` do."""
    if path.suffix.lower() != ".parquet":
        return {}
    with readable(path):
        features = Features.from_arrow_schema(pq.read_schema(path))
    return {name: stripped_names(feature) for name, feature in features.items() if isinstance(feature, ClassLabel)}


def stripped_names(feature: ClassLabel) -> list[str]:
    """Declared label names as the labels of all sources are read: without spaces around them."""
    return [name.strip() for name in feature.names]


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    file = pq.ParquetFile(path)
    _require_distinct(file.schema_arrow.names, path)
    names = class_names(path)
    wanted = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
    batches = file.iter_batches(batch_size=BATCH_ROWS, columns=wanted)
    for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), start=1):
        for name in names.keys() & row.keys():
            index = row[name]
            row[name] = names[name][index] if index is not None and index >= 0 else None
        yield number, row


def _require_distinct(names: Sequence[str], path: Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{path.name} names a column twice: {', '.join(twice)}. Rename one of them.")


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    limit = csv.field_size_limit(sys.maxsize)  # a long document may well have more than csv's 131,072 characters
    start = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            dialect, separator = _csv_format(path)
            reader = csv.reader(file, dialect, delimiter=separator)
            header = [name.strip() for name in next(reader, [])]
            _require_distinct([name for name in header if name], path)  # spreadsheets write columns without a name
            start = reader.line_num + 1
            for row in reader:
                if row and len(row) != len(header):
                    fields = f"{len(row)} field{'s' if len(row) > 1 else ''} separated by {separator!r}"
                    raise InputError(
                        f"{path.name} line {start} has {fields} where the header has {len(header)}. "
                        'Put quotes (") around a text that has a separator in it.'
                    )
                if row:
                    yield start, dict(zip(header, row, strict=True))
                start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f'{path.name} line {start} is broken: {error}. A quote in a quoted text is written twice (""), and each '
            "quoted text is closed."
        ) from None
    finally:
        csv.field_size_limit(limit)


class _Quoted(csv.excel):
    strict = True


class _Unquoted(csv.excel_tab):
    quoting = csv.QUOTE_NONE
    quotechar = None


def _csv_format(path: Path) -> tuple[type[csv.Dialect], str]:
    """Quoting and separator. A tsv is often written without any quoting, so that a lone quote in it is a character."""
    if path.suffix.lower() == ".csv":
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline()
        names = {mark: len(next(csv.reader([header], delimiter=mark))) for mark in (";", "\t", "|", ",")}
        # The comma comes last: of two that split the header alike, it is the one that stands in a column's name.
        return _Quoted, max(names, key=names.__getitem__) if max(names.values()) > 1 else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.reader(file, _Quoted, delimiter="\t")
            width = len(next(reader, []))
            return (_Quoted if all(len(row) in (0, width) for row in reader) else _Unquoted), "\t"
        except csv.Error:
            return _Unquoted, "\t"


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        start = next((line for line in file if line.strip()), "").lstrip()
        file.seek(0)
        rows: Iterable[tuple[int, Any]]
        if start.startswith("["):
            rows = enumerate(_parse_json(file.read(), path.name), start=1)
        else:
            rows = (
                (number, _parse_json(line, f"{path.name} line {number}"))
                for number, line in enumerate(file, start=1)
                if line.strip()
            )
        for number, row in rows:
            if not isinstance(row, dict):
                raise InputError(
                    f"{path.name}: row {number} is not an object. Give one JSON object a line, or a list of objects, "
                    'each like {"text": "...", "label": "..."}.'
                )
            yield number, row


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:  # the latter for brackets a thousand deep
        raise InputError(f"{where} is not JSON: {error}. Give one JSON object a line, or a list of objects.") from None


def _txt_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with path.open(encoding="utf-8-sig") as file:
        first = file.readline()
        file.seek(0)
        labelled = first.startswith(FASTTEXT_PREFIX)
        blank = None
        for number, line in enumerate(file, start=1):
            if not line.strip():
                blank = blank or number
                continue
            if blank is not None:  # blank lines at the end do no harm
                raise InputError(f"{path.name} line {blank} is empty. Remove it or give it a text.")
            text = line.rstrip("\n")
            if not labelled:
                yield number, {"text": text}
                continue
            label, text = [*text.split(maxsplit=1), ""][:2]
            if not label.startswith(FASTTEXT_PREFIX) or text.startswith(FASTTEXT_PREFIX):
                raise InputError(
                    f'{path.name} line {number} must be one label and a text, "{FASTTEXT_PREFIX}NAME text". '
                    f"Received: {line.strip()[:40]}"
                )
            yield number, {"text": text, "label": label.removeprefix(FASTTEXT_PREFIX)}


def nearest_path(path: Path, *, folders: bool = False) -> str:
    """The end of an error line about a missing path: the file, or the folder, beside it that was probably meant."""
    if not path.parent.is_dir():
        return ""
    return nearest(path.name, [other.name for other in path.parent.iterdir() if not folders or other.is_dir()])


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what reading a file raises into one line that names the file, and where in it."""
    try:
        yield
    except UnicodeDecodeError:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    byte = line[error.start]
                    raise InputError(
                        f"{path.name} line {number} is not UTF-8 (byte 0x{byte:02x}). Save the file as UTF-8; "
                        'spreadsheets call it "CSV UTF-8" or ask for the encoding.'
                    ) from None
        raise
    except OSError as error:
        raise InputError(f"{path.name} cannot be read: {error.strerror or error}") from None
    except pa.ArrowInvalid as error:
        raise InputError(f"{path.name} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
