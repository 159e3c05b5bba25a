"""Where labelled text comes from: a local file, a folder, a saved dataset, the Hub, or the embedded `stdlib-docs`.

Each source is opened as splits that give a sample of rows (to choose columns by) and then their texts and labels.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError

from ulmfit_tools.data.files import SAMPLE_ROWS, read_files, sample_rows
from ulmfit_tools.data.hub import hub_answers, hub_or_cache
from ulmfit_tools.data.readers import EXTENSIONS, class_names, nearest_path, stripped_names
from ulmfit_tools.errors import InputError

STDLIB_DOCS = "stdlib-docs"
SAVED_DATASET = ("state.json", "dataset_info.json")  # what `Dataset.save_to_disk` writes beside the rows
SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip


class Split(ABC):
    """One split of a source, before columns are chosen."""

    @property
    @abstractmethod
    def where(self) -> str:
        """What to call the split in messages."""

    @abstractmethod
    def sample(self) -> dict[str, list[Any]]:
        """The first rows as column name -> values."""

    @abstractmethod
    def class_names(self, column: str) -> list[str] | None:
        """The label names that the data itself declares for a column, in their order."""

    @abstractmethod
    def read(self, text_columns: Sequence[str], label_column: str | None) -> tuple[Dataset, pa.ChunkedArray | None]:
        """The texts, memory-mapped, and the labels as strings; neither is empty in any row."""

    def has_labels(self, column: str) -> bool:
        """Whether any row has a label: the Hub's test sets often hide theirs behind -1."""
        return True


@dataclass(frozen=True)
class FileSplit(Split):
    """A split in one local file, or in shards of the same format."""

    paths: tuple[Path, ...]

    @property
    def where(self) -> str:
        """The name of the file, or of its first shard."""
        return self.paths[0].name

    def sample(self) -> dict[str, list[Any]]:
        """The first rows of the file, read strictly."""
        return sample_rows(self.paths[0])

    def class_names(self, column: str) -> list[str] | None:
        """The names that a Parquet file written by `datasets` declares."""
        return class_names(self.paths[0]).get(column)

    def read(self, text_columns: Sequence[str], label_column: str | None) -> tuple[Dataset, pa.ChunkedArray | None]:
        """Reads and checks every row once; the next time, the rows come from the cache of `datasets`."""
        rows = read_files(self.paths, text_columns, label_column)
        labels = None if label_column is None else column_of(rows, label_column)
        return rows.select_columns(list(text_columns)), labels


@dataclass(frozen=True)
class DatasetSplit(Split):
    """A split that is a `datasets.Dataset` already."""

    dataset: Dataset
    name: str

    @property
    def where(self) -> str:
        """The name of the source and the split."""
        return self.name

    def sample(self) -> dict[str, list[Any]]:
        """The first rows of the plain columns: a nested one is neither text nor label, an image costly to decode."""
        plain = [name for name, feature in self.dataset.features.items() if isinstance(feature, (Value, ClassLabel))]
        rows = self.dataset.select_columns(plain).select(range(min(SAMPLE_ROWS, len(self.dataset))))
        if len(rows) == 0:
            raise InputError(f"{self.where} has no rows. Give a split with at least one row a class.")
        return rows.to_dict()

    def class_names(self, column: str) -> list[str] | None:
        """The names of a `ClassLabel` feature."""
        feature = self.dataset.features.get(column)
        return stripped_names(feature) if isinstance(feature, ClassLabel) else None

    def read(self, text_columns: Sequence[str], label_column: str | None) -> tuple[Dataset, pa.ChunkedArray | None]:
        """Checks the columns in batches."""
        for name in text_columns:
            _require_texts(self.dataset, name, self.where)
        labels = None if label_column is None else self._labels(label_column)
        return self.dataset.select_columns(list(text_columns)), labels

    def has_labels(self, column: str) -> bool:
        """Whether any index is not negative."""
        if not isinstance(self.dataset.features.get(column), ClassLabel):
            return True
        return bool(pc.any(pc.greater_equal(column_of(self.dataset, column), 0)).as_py())

    def _labels(self, column: str) -> pa.ChunkedArray:
        values = column_of(self.dataset, column)
        names = self.class_names(column)
        if names is not None:
            values = pc.if_else(pc.less(values, 0), None, values)
            values = pa.chunked_array([pc.take(pa.array(names), chunk) for chunk in values.chunks], pa.string())
        elif pa.types.is_floating(values.type) and pc.all(pc.equal(values, pc.floor(values))).as_py():
            values = values.cast(pa.int64())
        elif not (_is_string(values.type) or pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)):
            raise InputError(
                f'"{column}" of {self.where} must hold one class a row: texts, whole numbers, or true and false. '
                f"Received: {values.type}"
            )
        labels = pc.utf8_trim_whitespace(values.cast(pa.string()))
        missing = pc.fill_null(pc.equal(labels, ""), True)
        if pc.any(missing).as_py():
            raise InputError(
                f'{self.where} row {_rows_where(missing)}: the label "{column}" is missing. Remove the row or give it '
                "a label."
            )
        return labels


@dataclass(frozen=True)
class Source:
    """What `open_source` found: the splits by name (`train`, `validation`, `test`), and what to say about it."""

    splits: Mapping[str, Split]
    notes: tuple[str, ...] = ()


def open_source(source: str | Path, *, config_name: str | None = None, revision: str | None = None) -> Source:
    """Opens a file, a folder of splits, a saved dataset, a Hub name or `stdlib-docs`.

    Args:
        source: The name or path.
        config_name: The configuration of a Hub dataset, such as `sst2` of `glue`.
        revision: The revision of a Hub dataset.

    Raises:
        InputError: Nothing usable is there.
    """
    if str(source) == STDLIB_DOCS:
        from ulmfit_tools.data.stdlib_docs import load_stdlib_docs

        return _dataset_source(load_stdlib_docs(), STDLIB_DOCS)
    path = Path(source).expanduser()
    if path.is_file():
        return _file_source(path)
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or all((path / name).exists() for name in SAVED_DATASET):
            return _dataset_source(_load_saved(path), path.name)
        return _folder_source(path)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) and path.suffix.lower() not in EXTENSIONS:
        return _hub_source(str(source), config_name, revision)
    raise InputError(f"There is no file or folder {source}.{nearest_path(path)}")


def column_of(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """One column as Arrow, with any selection of rows applied."""
    return dataset.select_columns([name]).with_format("arrow")[:].column(name)


def _file_source(path: Path) -> Source:
    if path.suffix.lower() not in EXTENSIONS:
        raise InputError(f"{path.name} is none of the formats that can be read: {', '.join(EXTENSIONS)}.")
    return Source({"train": FileSplit((path,))})


def _load_saved(folder: Path) -> Dataset | DatasetDict:
    """What `save_to_disk` wrote; `datasets` checks none of its files, so that damaged ones raise almost anything."""
    try:
        return load_from_disk(str(folder))
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise InputError(
            f"{folder} cannot be read as a save_to_disk folder: a file of it is damaged, or a split has no rows. Save "
            f"it anew. {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from None


def _folder_source(folder: Path) -> Source:
    """Files named after their split (`train.csv`, `test-00000-of-00002.parquet`), or in folders that are."""
    found: dict[str, list[Path]] = {}
    ignored = []
    for path in sorted(folder.iterdir()):
        inside = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        files = [file for file in inside if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")]
        split = _split_of(path.name if path.is_dir() else path.stem)
        if split and files:
            found.setdefault(split, []).extend(files)
        elif files:
            ignored.append(path.name)
    if not found and len(ignored) == 1 and (folder / ignored[0]).is_file():
        return _file_source(folder / ignored[0])
    if not found:
        raise InputError(
            f"No file in {folder} names its split: train, validation (or valid, val, dev) and test, as in train.csv. "
            f"Formats: {', '.join(EXTENSIONS)}. Found: {', '.join(ignored) or 'nothing in these formats'}"
        )
    splits: dict[str, Split] = {
        name: FileSplit(_shards(name, found[name])) for name in ("train", "validation", "test") if name in found
    }
    notes = (f"Left out of {folder.name}, as their names say no split: {', '.join(ignored)}.",) if ignored else ()
    return Source(splits, notes)


def _split_of(name: str) -> str | None:
    splits = {SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else None


def _shards(split: str, files: list[Path]) -> tuple[Path, ...]:
    """The files of a split, which may differ in nothing but the numbers in their names."""
    if len({(file.parent, re.sub(r"\d+", "", file.name)) for file in files}) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(f"Several files could be the {split} split: {names}. Keep one, or give the file itself.")
    return tuple(files)


def _hub_source(name: str, config_name: str | None, revision: str | None) -> Source:
    online = hub_answers()
    try:
        with hub_or_cache(online):
            loaded = load_dataset(name, config_name, revision=revision)
    except DatasetNotFoundError:
        raise InputError(
            f'There is no file or folder "{name}" here, and no such dataset on the Hub.{nearest_path(Path(name))}'
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        if not online:
            raise InputError(
                f'There is no file or folder "{name}" here, and the Hub cannot be reached to look for a dataset of '
                f"that name.{nearest_path(Path(name))}"
            ) from None
        raise InputError(f'Dataset "{name}" of the Hub cannot be loaded: {" ".join(str(error).split())}') from None
    return _dataset_source(loaded, name)


def _dataset_source(loaded: Dataset | DatasetDict, where: str) -> Source:
    if isinstance(loaded, Dataset):
        return Source({"train": DatasetSplit(loaded, where)})
    splits: dict[str, Split] = {}
    ignored = []
    for name, dataset in loaded.items():
        split = _split_of(str(name))
        if split and split not in splits:
            splits[split] = DatasetSplit(dataset, f"{where} ({name})")
        else:
            ignored.append(str(name))
    if not splits:
        raise InputError(f"{where} has none of the splits train, validation and test. Splits: {', '.join(ignored)}")
    notes = (f"Splits of {where} left out: {', '.join(ignored)}.",) if ignored else ()
    return Source(splits, notes)


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _require_texts(dataset: Dataset, name: str, where: str, batch_size: int = 1_000) -> None:
    """Raises an `InputError` naming the first row whose text is empty or no string, reading in batches."""
    feature = dataset.features[name]
    if feature not in (Value("string"), Value("large_string")):
        raise InputError(f'"{name}" of {where} holds no texts. Received: {Features({name: feature})[name]}')
    arrow = dataset.select_columns([name]).with_format("arrow")
    for start in range(0, len(arrow), batch_size):
        texts = arrow[start : start + batch_size].column(name)
        empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), True)
        if pc.any(empty).as_py():
            rows = _rows_where(empty, start)
            raise InputError(f'{where} row {rows}: the text "{name}" is empty. Remove it or give it a text.')


def _rows_where(mask: pa.ChunkedArray, start: int = 0) -> int:
    """The number of the first row that the mask marks, from 1."""
    return start + pc.index(mask, True).as_py() + 1
