"""A stratified split that keeps copies of a text together."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from ulmfit_tools.errors import InputError


def stratified_split(
    labels: Sequence[int] | np.ndarray,
    fraction: float,
    seed: int,
    groups: Sequence[int] | np.ndarray | None = None,
    *,
    label_names: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows into a part to keep and a part to hold out, with the same share of every class.

    Of a class with n rows, round(fraction * n) are held out, but at least one and never all. Rows of one group stay
    on one side, so that a held-out text has no copy among those kept; a class whose rows are all one group is kept
    whole. A group whose rows differ in label counts for the label of its first row; where all rows of another label
    would be held out with such groups, the first of these is kept.

    Args:
        labels: The class of each row, shape (rows,).
        fraction: The share to hold out, between 0 and 1.
        seed: Decides which rows are held out; the same seed gives the same rows on every machine.
        groups: A number for each row, shape (rows,), equal for rows that belong together; `None`: all on their own.
        label_names: The names of the classes, for messages.

    Returns:
        The indices kept and the indices held out, each ascending.

    Raises:
        InputError: The fraction is not between 0 and 1, or a class has only one row.
    """
    if not 0 < fraction < 1:
        raise InputError(f"The share to hold out must lie between 0 and 1. Received: {fraction}")
    labels = np.asarray(labels)
    _, first_rows, group_of = np.unique(
        np.arange(len(labels)) if groups is None else np.asarray(groups), return_index=True, return_inverse=True
    )
    _require_pairs(labels, label_names)
    label_of_group = labels[first_rows]
    group_sizes = np.bincount(group_of)
    # The raw stream of PCG64 is fixed for good, unlike numpy's own ways of shuffling with it.
    stream = np.random.PCG64(seed)
    held_out = np.zeros(len(group_sizes), dtype=bool)
    for label in np.unique(label_of_group):
        candidates = np.flatnonzero(label_of_group == label)
        order = np.argsort(stream.random_raw(len(candidates)), kind="stable")
        held_out[_draw(candidates[order], group_sizes, fraction)] = True
    for label in np.setdiff1d(labels, labels[~held_out[group_of]]):
        held_out[group_of[np.argmax(labels == label)]] = False
    return np.flatnonzero(~held_out[group_of]), np.flatnonzero(held_out[group_of])


def _draw(candidates: np.ndarray, group_sizes: np.ndarray, fraction: float) -> list[int]:
    """Takes groups in the given order while they fit, until the class has its share."""
    if len(candidates) < 2:
        return []
    rows = int(group_sizes[candidates].sum())
    wanted = min(max(1, round(fraction * rows)), rows - 1)
    taken: list[int] = []
    for group in candidates:
        if group_sizes[group] <= wanted:
            taken.append(group)
            wanted -= group_sizes[group]
            if wanted == 0:
                break
    # Every group may be larger than the share; then the smallest is the nearest to it.
    return taken or [min(candidates, key=lambda group: group_sizes[group])]


def _require_pairs(labels: np.ndarray, label_names: Sequence[str] | None) -> None:
    values, counts = np.unique(labels, return_counts=True)
    single = [str(value) if label_names is None else label_names[value] for value in values[counts == 1]]
    if single:
        listed = ", ".join(single[:10]) + (f" and {len(single) - 10} more" if len(single) > 10 else "")
        raise InputError(
            f"A class with one row cannot be split into training and validation: {listed}. Give a validation split, "
            "add rows or merge the class, or set --validation_split 0 to train without validation."
        )


def text_groups(dataset: Dataset, text_columns: Sequence[str]) -> np.ndarray:
    """A number for each row, equal where the texts differ in nothing but case, spaces and punctuation.

    Args:
        dataset: The rows, read in batches.
        text_columns: The columns that together are the text.

    Returns:
        64-bit hashes, shape (rows,), dtype uint64.
    """
    groups = np.empty(len(dataset), dtype=np.uint64)
    row = 0
    for batch in dataset.select_columns(list(text_columns)).iter(batch_size=1_000):
        for texts in zip(*(batch[name] for name in text_columns), strict=True):
            digest = hashlib.blake2b("\0".join(map(normalised, texts)).encode(), digest_size=8).digest()
            groups[row] = int.from_bytes(digest, "little")
            row += 1
    return groups


def normalised(text: str) -> str:
    """The words of a text in lower case with one space between them; the text itself where it has no words."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text
