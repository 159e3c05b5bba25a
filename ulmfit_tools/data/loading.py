"""Labelled text from any source as checked, memory-mapped splits with one `labels` column."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict

from ulmfit_tools.data.columns import Columns, choose_columns, require_column
from ulmfit_tools.data.fingerprint import content_fingerprint
from ulmfit_tools.data.labels import booleans_as, require_classes, some, sorted_labels, unified, with_labels
from ulmfit_tools.data.readers import nearest_path
from ulmfit_tools.data.sources import Source, Split, open_source
from ulmfit_tools.data.splitting import stratified_split, text_groups
from ulmfit_tools.errors import InputError, nearest

DEFAULT_VALIDATION_SPLIT = 0.1


@dataclass(frozen=True)
class TextClassificationData:
    """Texts and their classes, ready to be tokenised.

    Attributes:
        splits: `train`, and `validation` and `test` where there are any; each with the text columns and `labels`, the
            index of the class in `label_names` (a `ClassLabel` feature).
        text_columns: One column, or two for text pairs.
        label_column: The column that the classes were read from.
        label_names: The names of the classes, in the order of their indices.
        fingerprint: A hash of everything above: the same for the same rows, columns and splits wherever they lie, and
            another one when any of them changes.
        source: What was asked for.
        notes: What was guessed, made or left out on the way, one line each, to be said aloud.
    """

    splits: DatasetDict
    text_columns: tuple[str, ...]
    label_column: str
    label_names: list[str]
    fingerprint: str
    source: str
    notes: list[str] = field(default_factory=list)


def load_text_classification(
    source: str | Path,
    *,
    text_columns: str | Sequence[str] | None = None,
    label_column: str | None = None,
    validation_split: float | None = None,
    seed: int = 42,
    config_name: str | None = None,
    revision: str | None = None,
) -> TextClassificationData:
    """Loads labelled texts for training.

    Args:
        source: A `.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet` or `.txt` file (fastText's `__label__NAME text` lines),
            a folder of such files named after their splits, a `datasets.save_to_disk` folder, the name of a dataset
            on the Hub, or `stdlib-docs`.
        text_columns: One column, or two for text pairs, as a list or with a comma between them; guessed if `None`.
        label_column: The column of classes: texts, whole numbers, or true and false; guessed if `None`.
        validation_split: The share of the training rows to hold out as validation where the source has no such split;
            `None` is 0.1, and 0 makes none. Stratified by class; copies of a text stay together.
        seed: Decides which rows are held out.
        config_name: The configuration of a Hub dataset.
        revision: The revision of a Hub dataset.

    Raises:
        InputError: Anything wrong with the data, in one line.
    """
    opened = open_source(source, config_name=config_name, revision=revision)
    _require_train(opened, source, validation_split)
    train = opened.splits["train"]
    columns = choose_columns(train.sample(), where=train.where, text_columns=text_columns, label_column=label_column)
    assert columns.label is not None  # choose_columns was asked for one
    notes = [*opened.notes, *columns.notes]
    declared = train.class_names(columns.label)
    texts, labels = _read_splits(opened, columns, notes)
    if declared is None:
        labels = unified(labels)
    label_names = declared or sorted_labels(pc.unique(labels["train"]).to_pylist())
    require_classes(labels, opened.splits)
    made = {name: with_labels(texts[name], labels[name], label_names) for name in texts}
    notes += _copies(made, columns.text)
    if "validation" not in made and validation_split != 0:
        share = DEFAULT_VALIDATION_SPLIT if validation_split is None else validation_split
        made = _with_validation(made, columns.text, label_names, share, seed)
        rows = len(made["validation"])
        notes.append(
            f"No validation split was given: {rows:,} of {rows + len(made['train']):,} training rows are held out as "
            f"one (share {share:g} of each class, at least one row; copies of a text stay together; seed {seed})."
        )
    return _assembled(made, columns, label_names, str(source), notes)


def load_for_evaluation(
    source: str | Path,
    label_names: Sequence[str],
    *,
    split: str | None = None,
    text_columns: str | Sequence[str] | None = None,
    trained_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    trained_label: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
) -> TextClassificationData:
    """Loads one split of labelled texts for a model that is trained already.

    Args:
        source: As for `load_text_classification`.
        label_names: The classes of the model, in the order of its outputs.
        split: `train`, `validation` or `test`; `None` takes `test`, else `validation`, else `train`.
        text_columns: As for `load_text_classification`.
        trained_columns: Text columns that the model was trained on: taken before any guess where the data has them.
        label_column: As for `load_text_classification`.
        trained_label: The label column that the model was trained on: as `trained_columns`.
        config_name: The configuration of a Hub dataset.
        revision: The revision of a Hub dataset.

    Returns:
        Data with that one split; `labels` are indices into the model's `label_names`.

    Raises:
        InputError: Anything wrong with the data, such as a label that the model does not know.
    """
    opened = open_source(source, config_name=config_name, revision=revision)
    name = split or next(name for name in ("test", "validation", "train") if name in opened.splits)
    if name not in opened.splits:
        raise InputError(
            f'{source} has no split "{name}". Splits: {", ".join(opened.splits)}.{nearest(name, opened.splits)}'
        )
    chosen = opened.splits[name]
    columns = choose_columns(
        chosen.sample(),
        where=chosen.where,
        text_columns=text_columns,
        trained_columns=trained_columns,
        label_column=label_column,
        trained_label=trained_label,
    )
    assert columns.label is not None  # choose_columns was asked for one
    texts, labels = chosen.read(columns.text, columns.label)
    found = pc.unique(labels).to_pylist()
    if not set(found) <= set(label_names):
        labels = unified({name: labels})[name]
        found = pc.unique(labels).to_pylist()
    notes = [*opened.notes, *columns.notes]
    if not set(found) <= set(label_names):
        matched = booleans_as(labels, label_names)
        if not matched.equals(labels):
            notes.append(f"Labels true and false are written in other letters than the model's: {some(label_names)}.")
        labels, found = matched, pc.unique(matched).to_pylist()
    unknown = sorted_labels(set(found) - set(label_names))
    if unknown:
        raise InputError(
            f"{chosen.where} has labels that the model does not know: {some(unknown)}. "
            f"The model knows: {some(label_names)}"
        )
    notes.append(f"Evaluating on split {name}: {len(texts):,} rows.")
    made = {name: with_labels(texts, labels, list(label_names))}
    return _assembled(made, columns, list(label_names), str(source), notes)


def read_texts(
    path: str | Path,
    text_columns: str | Sequence[str] | None = None,
    trained_columns: Sequence[str] | None = None,
) -> tuple[list[str] | list[tuple[str, str]], list[str]]:
    """The texts of a file, without labels, to be classified.

    Args:
        path: A file in one of the formats of `load_text_classification`; a `.txt` file is one text a line.
        text_columns: The column, or two for text pairs; guessed if `None`.
        trained_columns: As for `load_for_evaluation`.

    Returns:
        The texts in the order of the file, pairs of texts where there are two columns; and what was guessed, one line
        each, to be said aloud.

    Raises:
        InputError: The file is missing or broken, or a text is empty.
    """
    if not Path(path).expanduser().is_file():
        raise InputError(f"There is no file {path}.{nearest_path(Path(path).expanduser())}")
    split = open_source(path).splits["train"]
    columns = choose_columns(
        split.sample(),
        where=split.where,
        text_columns=text_columns,
        trained_columns=trained_columns,
        with_label=False,
    )
    texts, _ = split.read(columns.text, None)
    by_column = [list(texts[name]) for name in columns.text]
    return (by_column[0] if len(by_column) == 1 else list(zip(*by_column, strict=True))), list(columns.notes)


def _require_train(opened: Source, source: str | Path, validation_split: float | None) -> None:
    if "train" not in opened.splits:
        raise InputError(f"{source} has no train split. Splits: {', '.join(opened.splits)}")
    if validation_split is not None and not 0 <= validation_split < 1:
        raise InputError(f"--validation_split must be at least 0 and less than 1. Received: {validation_split}")
    if validation_split and "validation" in opened.splits:
        raise InputError(
            f"{source} has a validation split of its own ({opened.splits['validation'].where}), so none is made. "
            f"Leave out --validation_split. Received: {validation_split}"
        )


def _read_splits(
    opened: Source, columns: Columns, notes: list[str]
) -> tuple[dict[str, Dataset], dict[str, pa.ChunkedArray]]:
    texts, labels = {}, {}
    for name, split in opened.splits.items():
        if name != "train" and not split.has_labels(str(columns.label)):
            notes.append(f"Split {name} left out: its labels are hidden.")
            continue
        if name != "train":
            _require_columns(split, columns)
        texts[name], labels[name] = split.read(columns.text, columns.label)
    return texts, labels


def _require_columns(split: Split, columns: Columns) -> None:
    available = list(split.sample())
    for name in columns.text:
        require_column(name, available, split.where)
    if columns.label not in available:
        raise InputError(
            f'{split.where} has no label column "{columns.label}". Columns: {some(available)}.'
            f"{nearest(str(columns.label), available)} A file without labels is one to predict: move it elsewhere."
        )


def _copies(made: dict[str, Dataset], text_columns: Sequence[str]) -> list[str]:
    """Says of splits that were given how many of their texts were trained on too: such scores flatter a model."""
    given = {name: split for name, split in made.items() if name != "train"}
    if not given:
        return []
    trained = text_groups(made["train"], text_columns)
    copies = {name: np.isin(text_groups(split, text_columns), trained).sum() for name, split in given.items()}
    return [
        f"{count:,} of {len(given[name]):,} {name} texts are training texts too, but for case, spaces and "
        "punctuation: scores on them say little about new texts."
        for name, count in copies.items()
        if count
    ]


def _with_validation(
    made: dict[str, Dataset], text_columns: Sequence[str], label_names: list[str], share: float, seed: int
) -> dict[str, Dataset]:
    train = made["train"]
    labels = train.select_columns(["labels"]).with_format("numpy")[:]["labels"]
    kept, held_out = stratified_split(
        labels, share, seed, groups=text_groups(train, text_columns), label_names=label_names
    )
    return {"train": train.select(kept), "validation": train.select(held_out)} | {
        name: split for name, split in made.items() if name != "train"
    }


def _assembled(
    made: dict[str, Dataset], columns: Columns, label_names: list[str], source: str, notes: list[str]
) -> TextClassificationData:
    fingerprint = content_fingerprint(made, columns.text, [list(columns.text), columns.label, label_names])
    return TextClassificationData(
        splits=DatasetDict(made),
        text_columns=columns.text,
        label_column=str(columns.label),
        label_names=label_names,
        fingerprint=fingerprint,
        source=source,
        notes=notes,
    )
