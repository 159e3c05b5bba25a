"""The order of the rows in training: batches of similar length, shuffled anew each epoch, the same when resumed.

Padding every batch to its longest row wastes most of the work where short and long rows share a batch. The order here
is a pure function of the seed and the epoch. `transformers.LengthGroupedSampler` draws its order from PyTorch's global
random numbers, so a run that is resumed in the middle of an epoch sees that epoch's rows in another order: some of
them twice and some not at all.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import pyarrow.compute
import torch
from torch.utils.data import Sampler

from ulmfit_tools.errors import InputError

_BATCHES_SORTED_TOGETHER = 50


def length_grouped_order(lengths: torch.Tensor, batch_size: int, *, seed: int, epoch: int) -> list[int]:
    """The rows of one epoch, each exactly once, so that every `batch_size` rows in turn are of similar length.

    The rows are shuffled, sorted by length within groups of 50 batches (of a quarter of the data where that is less),
    cut into batches, and the batches are shuffled. Two choices beside that:

    - The batch with the longest row comes first: a run that needs more memory than there is stops in its first step,
      and again right after a layer is thawed, not somewhere in the night.
    - The rows that do not fill a batch are drawn from all rows, not the shortest ones, so that dropping them
      (`dataloader_drop_last`) drops no kind of text more often than another.

    Args:
        lengths: The length of each row, shape (rows,).
        batch_size: Number of rows that are padded or that wait for each other: the batch of all processes together.
        seed: With `epoch`, decides the order.
        epoch: Number of the epoch, from 0.

    Returns:
        The row numbers in their order.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    rows = torch.randperm(len(lengths), generator=generator)
    batches = len(rows) // batch_size
    if batches == 0:
        return rows.tolist()
    body = batches * batch_size
    position = int(lengths[rows].argmax())
    if position >= body:  # the longest row must not be among those that fill no batch
        rows[[0, position]] = rows[[position, 0]]
    together = max(1, min(batches // 4, _BATCHES_SORTED_TOGETHER)) * batch_size
    groups = [group[lengths[group].argsort(descending=True, stable=True)] for group in rows[:body].split(together)]
    order = torch.cat(groups).view(batches, batch_size)[torch.randperm(batches, generator=generator)]
    longest = int(lengths[order].amax(dim=1).argmax())
    order[[0, longest]] = order[[longest, 0]]
    return [*order.flatten().tolist(), *rows[body:].tolist()]


class LongestFirstSampler(Sampler[int]):
    """Yields the rows from the longest to the shortest, for evaluation: least padding, and memory runs out at once.

    Args:
        lengths: The length of each row.
    """

    def __init__(self, lengths: Sequence[int] | torch.Tensor) -> None:
        self.order: list[int] = torch.as_tensor(lengths).argsort(descending=True, stable=True).tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)


def evaluation_order(dataloader: Any) -> list[int] | None:
    """The rows in the order in which a data loader has `LongestFirstSampler` give them; None for any other loader."""
    batches = getattr(dataloader, "batch_sampler", None)
    batches = getattr(batches, "batch_sampler", batches)  # Accelerate deals the batches out to several processes
    sampler = getattr(batches, "sampler", None)
    return sampler.order if isinstance(sampler, LongestFirstSampler) else None


class EpochLengthGroupedSampler(Sampler[int]):
    """Yields the rows in `length_grouped_order`; another order each epoch, the same for the same seed and epoch.

    Every process makes the same order, so Accelerate can deal the batches out to the processes.

    Args:
        lengths: The length of each row.
        batch_size: Number of rows of a batch, of all processes together.
        seed: Decides the order, with the epoch.
    """

    def __init__(self, lengths: Sequence[int] | torch.Tensor, batch_size: int, seed: int = 0) -> None:
        if batch_size < 1:
            raise InputError(f"The batch size must be at least 1. Received: batch_size={batch_size}")
        self.lengths = torch.as_tensor(lengths, dtype=torch.int32)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives; `Trainer` and Accelerate call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(length_grouped_order(self.lengths, self.batch_size, seed=self.seed, epoch=self.epoch))


def row_lengths(dataset: Any, column: str = "input_ids", *, length_column: str | None = None) -> torch.Tensor:
    """The length of every row, without decoding the rows where the dataset is an Arrow table.

    Args:
        dataset: A `datasets.Dataset`, or anything with a length whose rows are mappings.
        column: What is counted in each row.
        length_column: A column of a `datasets.Dataset` that already holds the lengths, to be used where it exists.

    Returns:
        Shape (rows,), int32.

    Raises:
        InputError: The rows have no such column.
    """
    columns = dataset.column_names if isinstance(dataset, datasets.Dataset) else []
    if length_column in columns:
        return torch.as_tensor(dataset[length_column][:], dtype=torch.int32)
    if column in columns:
        tables = dataset.with_format("arrow", columns=[column]).iter(batch_size=10_000)
        counts = [pyarrow.compute.list_value_length(table[column]).to_pylist() for table in tables]
        return torch.tensor([count for part in counts for count in part], dtype=torch.int32)
    if len(dataset) and not (isinstance(dataset[0], Mapping) and column in dataset[0]):
        raise InputError(
            f'Grouping by length needs rows with "{column}"; without it pass --train_sampling_strategy random.'
            f" Received: {_describe(dataset[0])}"
        )
    return torch.tensor([len(dataset[index][column]) for index in range(len(dataset))], dtype=torch.int32)


def _describe(row: Any) -> str:
    if isinstance(row, Mapping):
        return f"rows with {', '.join(map(str, row))}"
    return f"rows of type {type(row).__name__}"
