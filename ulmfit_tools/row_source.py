"""The rows of a dataset as the model sees them: collated, counted, and told apart by their content."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from transformers import Trainer
from transformers.trainer_utils import RemoveColumnsCollator

from ulmfit_tools.data.numbered_rows import used_columns, used_names
from ulmfit_tools.freeze_boundary import CannotPrecompute
from ulmfit_tools.sampling import row_lengths

Batch = dict[str, torch.Tensor]


class Source:
    """A dataset as the model sees it: its rows, collated.

    Args:
        dataset: The rows.
        trainer: Whose collator, labels and model they are for.
    """

    def __init__(self, dataset: Any, trainer: Trainer) -> None:
        self.collate: Callable[[list[Any]], Any] = trainer.data_collator
        self.label_names = set(trainer.label_names)
        self._length_column = trainer.args.length_column_name
        self.counted = getattr(trainer.processing_class, "model_input_names", ["input_ids"])[0]
        self.rows = used_columns(dataset, trainer)
        if not isinstance(dataset, datasets.Dataset) and trainer.args.remove_unused_columns:  # as Trainer does it
            self.collate = RemoveColumnsCollator(self.collate, [*used_names(trainer)])

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The collated batch of some rows."""
        numbers = [int(row) for row in rows]
        if hasattr(self.rows, "__getitems__"):  # all at once, as a DataLoader does it
            return dict(self.collate(self.rows.__getitems__(numbers)))
        return dict(self.collate([self.rows[number] for number in numbers]))

    def inputs(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The model's inputs of some rows: without labels, with an attention mask.

        Raises:
            CannotPrecompute: The batches have no `input_ids` of the shape (rows, tokens), or a mask of another one.
        """
        batch = self._unlabelled(self.batch(rows))
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        return batch

    def labels(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The labels of some rows, by name."""
        return {name: value for name, value in self.batch(rows).items() if name in self.label_names}

    def _unlabelled(self, batch: Batch) -> Batch:
        inputs = {name: value for name, value in batch.items() if name not in self.label_names}
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or (mask is not None and mask.shape != ids.shape):
            raise CannotPrecompute("The batches have no input_ids and attention_mask of the shape (rows, tokens)")
        return inputs

    @functools.cached_property
    def _read(self) -> tuple[np.ndarray, str]:
        lengths, digests = [], []
        unmasked: set[int] = set()  # how wide batches and single rows are that have no mask
        for rows in slices(np.arange(len(self)), 1000):
            whole, again = self.batch(rows), self.batch(rows)
            if whole.keys() != again.keys() or any(not torch.equal(whole[name], again[name]) for name in whole):
                raise CannotPrecompute("The collator gives another batch for the same rows each time: nothing is kept")
            batch = self._unlabelled(whole)
            if "attention_mask" not in batch:
                unmasked |= {part["input_ids"].shape[1] for part in (batch, *(self.batch([row]) for row in rows))}
            if len(unmasked) > 1:
                raise CannotPrecompute(
                    f"The collator pads rows of {min(unmasked)} tokens to {max(unmasked)} without an attention_mask, "
                    "so nothing tells what is padding: have it give one"
                )
            mask = batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            lengths.append(mask.sum(1).numpy().astype(np.int32))
            kept = {name: value[mask] if value.shape[:2] == mask.shape else value for name, value in batch.items()}
            digests.append(content_key(*(part for item in sorted(kept.items()) for part in item)))
        return np.concatenate(lengths), content_key(digests)

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each row has, by its attention mask; shape (rows,)."""
        return self._read[0]

    @property
    def fingerprint(self) -> str:
        """What the rows' inputs are, padding and labels aside."""
        return f"{self._read[1]} {content_key(self.lengths)}"

    @functools.cached_property
    def sampled_lengths(self) -> list[int]:
        """How long each row is to a sampler that groups them by length."""
        return row_lengths(self.rows, self.counted, length_column=self._length_column).tolist()

    @functools.cached_property
    def order(self) -> np.ndarray:
        """The rows from the longest to the shortest."""
        return np.argsort(-self.lengths, kind="stable")


def slices(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """The rows, so many at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def a_few(rows: np.ndarray) -> np.ndarray:
    """Eight of the rows at most, from the first to the last."""
    return rows[np.linspace(0, len(rows) - 1, min(8, len(rows))).astype(int)]


def content_key(*parts: Any) -> str:
    """A name for what was made from some content: the same for the same content, on every machine.

    Args:
        *parts: Tensors and arrays (by type, shape and bytes), bytes, or values that JSON can hold.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            part = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        elif isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            part = np.ascontiguousarray(part).tobytes()
        elif not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True, default=str).encode()
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]
