"""Rows that know their own number, for collators that look something up by it."""

import inspect
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset
from transformers import Trainer

ROW = "row_number"


class NumberedRows(Dataset):
    """The rows of any dataset, each a mapping, with their numbers from `first` on."""

    def __init__(self, rows: Any, first: int = 0) -> None:
        self.rows, self.first = rows, first

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.rows[row], ROW: self.first + row}


def numbered(rows: Any, first: int = 0) -> Any:
    """The rows with a column `ROW`: the numbers from `first` on."""
    if isinstance(rows, datasets.Dataset) and rows.format["type"] != "custom":  # a transform would drop the column
        return rows.add_column(ROW, np.arange(first, first + len(rows)))
    return NumberedRows(rows, first)


def used_columns(rows: Any, trainer: Trainer) -> Any:
    """The rows without the columns that a trainer with `remove_unused_columns` would take away."""
    if not isinstance(rows, datasets.Dataset) or not trainer.args.remove_unused_columns:
        return rows
    read = used_names(trainer)
    return rows.remove_columns([name for name in rows.column_names if name not in read])


def used_names(trainer: Trainer) -> set[str]:
    """The names that a trainer with `remove_unused_columns` leaves in a row."""
    model: Any = trainer.model
    base = getattr(model, "get_base_model", lambda: model)()  # under PEFT, whose own forward names fewer inputs
    return {*inspect.signature(base.forward).parameters, *trainer.label_names, "label", "label_ids"}
