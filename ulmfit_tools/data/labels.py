"""Labels of all splits as indices into one list of names."""

import ast
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset

from ulmfit_tools.data.sources import Split
from ulmfit_tools.errors import InputError

INTEGER = re.compile(r"([+-]?\d+)(?:\.0*)?")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_BOOLEANS = ("true", "false")
_MANY = 20  # more numbers with fractions than these are measured; half stars and versions are still classes


def sorted_labels(labels: Collection[str]) -> list[str]:
    """Label names in a fixed order: as numbers where all of them are whole numbers, else by character."""
    wholes = {label: _whole(label) for label in labels}
    if None in wholes.values():
        return sorted(labels)
    return sorted(labels, key=lambda label: (int(str(wholes[label])), label))


def unified(labels: Mapping[str, pa.ChunkedArray]) -> dict[str, pa.ChunkedArray]:
    """Writes 1.0 as 1 where every label of every split is a whole number: tools write such columns both ways."""
    found = {name: pc.unique(column) for name, column in labels.items()}
    every = {label for values in found.values() for label in values.to_pylist()}
    if None in map(_whole, every) or not any("." in label for label in every):
        return dict(labels)
    return {
        name: pc.take(pa.array(map(_whole, found[name].to_pylist())), pc.index_in(column, found[name]))
        for name, column in labels.items()
    }


def booleans_as(labels: pa.ChunkedArray, names: Sequence[str]) -> pa.ChunkedArray:
    """Writes true and false as `names` have them: JSON and Parquet give `true`, pandas writes `True` into a CSV file.

    What is one of the names already stays, and so does what could be two of them.
    """
    found = pc.unique(labels)
    written = []
    for label in found.to_pylist():
        meant = [name for name in names if name.lower() == label.lower()]
        told_apart = label in names or len(meant) != 1 or label.lower() not in _BOOLEANS
        written.append(label if told_apart else meant[0])
    return pc.take(pa.array(written, pa.string()), pc.index_in(labels, found))


def require_classes(labels: Mapping[str, pa.ChunkedArray], splits: Mapping[str, Split]) -> None:
    """Raises an `InputError` unless training has two classes or more, and the other splits have no more than these.

    So it does where the labels, read from text, are numbers to be predicted or lists of classes.
    """
    trained = set(pc.unique(labels["train"]).to_pylist())
    if what := _no_classes(trained):
        raise InputError(
            f"The labels of {splits['train'].where} are {what}: {some(sorted_labels(trained), 5)}. Only one class a "
            "row can be learnt: give a column of classes"
        )
    if len(trained) < 2:
        raise InputError(
            f"{splits['train'].where} has one class only: {some(list(trained))}. A classifier needs at least two."
        )
    for name, column in labels.items():
        unknown = sorted_labels(set(pc.unique(column).to_pylist()) - trained)
        if unknown:
            raise InputError(
                f"{splits[name].where} has labels that the training rows lack: {some(unknown)}. "
                f"The training rows have: {some(sorted_labels(trained))}"
            )


def _no_classes(labels: Collection[str]) -> str | None:
    """What labels are that are no classes; None where they may be classes."""
    numbers = all(_NUMBER.fullmatch(label) for label in labels)
    if numbers and None in map(_whole, labels) and len(labels) > _MANY:
        return f"{len(labels):,} numbers with fractions, as for a regression"
    lists = [_as_list(label) for label in labels]
    if any(values is not None and len(values) != 1 for values in lists) and None not in lists:
        return "lists, as for several labels a row"
    return None


def _as_list(label: str) -> Collection[object] | None:
    """The list that a label is written as; None where it is another text."""
    if not label.startswith(("[", "(", "{")):
        return None
    try:
        values = ast.literal_eval(label)
    except (ValueError, SyntaxError):
        return None
    return values if isinstance(values, (list, tuple, set)) else None


def with_labels(texts: Dataset, labels: pa.ChunkedArray, label_names: list[str]) -> Dataset:
    """Adds the column `labels`: indices into `label_names`, in memory beside the memory-mapped texts."""
    indices = pc.index_in(labels, pa.array(label_names, pa.string())).to_numpy().astype(np.int64)
    return texts.add_column("labels", indices, feature=ClassLabel(names=label_names))


def some(names: Sequence[str], limit: int = 10) -> str:
    """The first names of a long list, for a message."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _whole(label: str) -> str | None:
    match = INTEGER.fullmatch(label)
    return match[1] if match else None
