"""Text augmentation on the fly: each epoch trains on another version of every text, and a resumed run on the same ones.

What becomes of a row is a function of the seed, the epoch and the row's number, and of nothing else: not of the batch
it comes in, of what was drawn before, of the workers that load the data or of the processes that train. The training
rows are numbered where they are read, `Trainer` tells the epoch when it begins, and the collator does the rest. Rows
without a number, as those of an evaluation, stay as they are.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ulmfit_tools.errors import InputError

_DRAWS = (
    7  # random numbers for each token, drawn whatever the rates: changing one rate leaves the other edits as they are
)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How much of a text is changed, each a share of its ordinary tokens.

    Special tokens and padding are left alone. Each stretch of tokens between them, as each text of a pair, is changed
    by itself and keeps at least one of its own tokens; texts are told apart by special tokens and token types. Words
    of several tokens are not kept together. Several rates act together: swap, span, drop, then mask what is left.

    Pretrained transformers gain less from such edits than models trained from scratch: Longpre et al. 2020
    (arXiv:2010.01764) found no consistent improvement over six datasets. Compare with a run without.

    Args:
        mask: Probability that a token becomes the tokenizer's mask token (as SSMBA corrupts texts, Ng et al. 2020,
            arXiv:2009.10195).
        drop: Probability that a token is left out (random deletion of EDA, Wei & Zou 2019, arXiv:1901.11196,
            section 2).
        swap: Probability that a pair of neighbours changes places. Pairs do not overlap, so it is also the share of
            tokens that move, but for one at an end. EDA swaps words at any distance; neighbours keep their sense better.
        span: Share of the tokens that is cut out in one piece, from a random place (span cutoff, Shen et al. 2020,
            arXiv:2009.13818, section 3.1; there it is overwritten by zeros). Of a short text, this share on average.

    Raises:
        InputError: A rate is not a number from 0 to below 1, or all of them are 0.
    """

    mask: float = 0.0
    drop: float = 0.0
    swap: float = 0.0
    span: float = 0.0

    def __post_init__(self) -> None:
        rates = dataclasses.asdict(self)
        for name, rate in rates.items():
            number = isinstance(rate, (int, float)) and not isinstance(rate, bool) and math.isfinite(rate)
            if not number or not 0 <= rate < 1:
                raise InputError(f"Augmentation: {name} is a share from 0 to below 1. Received: {name}={rate!r}")
        if not any(rates.values()):
            raise InputError(
                f"Augmentation needs a rate above 0 for {', '.join(rates)}; for none leave it out. Received: all 0"
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse to mask with a tokenizer that has no mask token.

        Raises:
            InputError: It has none.
        """
        if self.mask and tokenizer.mask_token_id is None:
            raise InputError(
                f"{type(tokenizer).__name__} has no mask token: use drop, swap or span. Received: mask={self.mask}"
            )


# Leaving a tenth of the tokens out needs no mask token, and 0.1 is the rate that the code of EDA has for all of its
# operations (the code of cutoff, for its span).
DEFAULT_AUGMENTATION = Augmentation(drop=0.1)


def augmented(
    dataset: Any,
    collator: Callable[[list[Any]], Any],
    augmentation: Augmentation,
    *,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> tuple["NumberedRows", "AugmentingCollator", "AugmentationEpoch"]:
    """What a `Trainer` needs to train on augmented texts.

        rows, collator, epoch = augmented(rows, collator, Augmentation(drop=0.1), tokenizer=tokenizer, seed=args.seed)
        Trainer(train_dataset=rows, data_collator=collator, callbacks=[epoch], ...)

    Evaluate on the dataset as it was: the rows that are returned are augmented wherever they are collated.

    Args:
        dataset: Tokenised training rows, padded or not: a `datasets.Dataset` or anything with numbered rows, each a
            mapping.
        collator: Makes a batch of rows; it must pad, as `DataCollatorWithPadding` does.
        augmentation: The rates.
        tokenizer: The tokenizer of the rows.
        seed: Decides with the epoch and the row's number what becomes of a row.

    Returns:
        The rows, the collator and the callback.

    Raises:
        InputError: The rows have no numbers or no token ids, the tokenizer has no mask token, or the seed is negative.
    """
    if not has_length(dataset) or not hasattr(dataset, "__getitem__"):
        raise InputError(
            "Augmentation goes by the number of a row, so the training data needs a length and numbered rows."
            f" Received: {type(dataset).__name__}"
        )
    ids_name = tokenizer.model_input_names[0]
    if len(dataset) and ids_name not in dataset[0]:
        raise InputError(f'Augmentation changes tokens: tokenise first. Received: rows without "{ids_name}"')
    wrapped = AugmentingCollator(collator, augmentation, tokenizer=tokenizer, seed=seed)
    return NumberedRows(dataset, ids_name), wrapped, AugmentationEpoch(wrapped)


@dataclass(frozen=True)
class _NumberedIds:
    """Token ids with the number of their row. `Trainer` takes away a column that the model does not read."""

    ids: Any
    row: int

    def __len__(self) -> int:
        return len(self.ids)


class NumberedRows(Subset[Any]):
    """All rows of a dataset, each with its number on its token ids, for an `AugmentingCollator`.

    Args:
        dataset: The rows.
        ids_name: The column of the token ids.
    """

    def __init__(self, dataset: Any, ids_name: str = "input_ids") -> None:
        super().__init__(dataset, range(len(dataset)))
        self.ids_name = ids_name

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return self._numbered(super().__getitem__(index), index)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return list(map(self._numbered, super().__getitems__(indices), indices))

    def _numbered(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        return {**row, self.ids_name: _NumberedIds(row[self.ids_name], self.indices[index])}


class AugmentingCollator:
    """Changes the tokens of numbered rows and leaves it to another collator to make a batch of them.

    Args:
        collator: The other one.
        augmentation: The rates.
        tokenizer: The tokenizer of the rows: its special tokens are left alone, and the columns that it makes for its
            model are changed together.
        seed: Decides with the epoch and the row's number what becomes of a row.

    Raises:
        InputError: The tokenizer has no mask token, or the seed is negative.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any],
        augmentation: Augmentation,
        *,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
    ) -> None:
        if seed < 0:
            raise InputError(f"The seed must not be negative. Received: seed={seed}")
        augmentation.check_tokenizer(tokenizer)
        self.collator = collator
        self.augmentation = augmentation
        self.tokenizer = tokenizer
        self.seed = seed
        self._special_ids = np.array(tokenizer.all_special_ids)
        # In shared memory: workers that outlive an epoch (`dataloader_persistent_workers`) have copies of all else.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, for the rows that are collated from now on, in this process and its workers."""
        self._epoch.fill_(epoch)

    def __call__(self, features: list[Any]) -> Any:
        """A batch; numbered rows are augmented, others are as they were."""
        ids_name = self.tokenizer.model_input_names[0]
        numbered = [
            place
            for place, row in enumerate(features)
            if isinstance(row, Mapping) and isinstance(row.get(ids_name), _NumberedIds)
        ]
        if numbered:
            features = list(features)
            for place, row in zip(numbered, self._augment([features[place] for place in numbered]), strict=True):
                features[place] = row
        return self.collator(features)

    def _augment(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        names = [name for name in self.tokenizer.model_input_names if name in rows[0]]
        numbers = [row[names[0]].row for row in rows]
        rows = [{**row, names[0]: row[names[0]].ids} for row in rows]
        lengths = [len(row[names[0]]) for row in rows]
        columns = {name: np.concatenate([np.asarray(row[name], dtype=np.int64) for row in rows]) for name in names}
        order, kept, masked = _edit(
            self._ordinary(columns[names[0]], columns.get("attention_mask")),
            [np.repeat(np.arange(len(rows)), lengths), *(columns[name] for name in names if name == "token_type_ids")],
            np.concatenate([self._draw(*pair) for pair in zip(numbers, lengths, strict=True)]),
            self.augmentation,
        )
        ends = np.r_[0, np.cumsum(kept)][np.r_[0, np.cumsum(lengths)]]
        for name, values in columns.items():
            values = values[order]
            if name == names[0] and self.augmentation.mask:
                values[masked] = self.tokenizer.mask_token_id
            values = values[kept]
            for row, begin, end in zip(rows, ends[:-1], ends[1:], strict=True):
                row[name] = _like(row[name], values[begin:end])
        return rows

    def _ordinary(self, ids: np.ndarray, attention_mask: np.ndarray | None) -> np.ndarray:
        ordinary = ~np.isin(ids, self._special_ids)
        return ordinary if attention_mask is None else ordinary & (attention_mask != 0)

    def _draw(self, row: int, length: int) -> np.ndarray:
        """The random numbers of a row in this epoch, shape (length, draws): a longer row begins with the same ones."""
        generator = np.random.Generator(np.random.PCG64([self.seed, int(self._epoch), row]))
        return generator.random((length, _DRAWS), dtype=np.float32)


class AugmentationEpoch(TrainerCallback):
    """Tells the collator of every epoch that begins; a resumed run begins with the one that it is in.

    Args:
        collator: The collator.
    """

    def __init__(self, collator: AugmentingCollator) -> None:
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the epoch's first row is read: nothing is read ahead from one epoch to the next."""
        self.collator.set_epoch(int(state.epoch))


def _edit(
    ordinary: np.ndarray, parts: Sequence[np.ndarray], draws: np.ndarray, rates: Augmentation
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What to do with the tokens of some rows, one row after the other.

    Args:
        ordinary: Whether a token may be changed; shape (tokens,), as all but `draws`.
        parts: Numbers that differ between neighbours where one text ends and another begins.
        draws: Random numbers from 0 to below 1, shape (tokens, draws).
        rates: The rates.

    Returns:
        The order of the tokens; whether a place in that order is kept; whether it is masked.
    """
    order, kept, masked = np.arange(len(ordinary)), np.ones(len(ordinary), bool), np.zeros(len(ordinary), bool)
    where = np.flatnonzero(ordinary)
    if not len(where):
        return order, kept, masked
    mask, drop, swap, shift, rounding, place_of_span = draws[where].T
    apart = (np.diff(where) != 1) | np.any([np.diff(part[where]) != 0 for part in parts], axis=0)
    starts = np.flatnonzero(np.r_[True, apart])  # of the stretches of tokens that are changed by themselves
    sizes = np.diff(np.r_[starts, len(where)])
    stretch = np.repeat(np.arange(len(starts)), sizes)
    place = np.arange(len(where)) - starts[stretch]

    odd = (shift[starts] < 0.5)[stretch]  # whether the first pair begins at the second token
    left = where[(place % 2 == odd) & (place + 1 < sizes[stretch]) & (swap < rates.swap)]
    order[left], order[left + 1] = left + 1, left

    length = np.minimum((sizes * rates.span + rounding[starts]).astype(int), sizes - 1)
    begin = (place_of_span[starts] * (sizes - length + 1)).astype(int)
    removed = (place >= begin[stretch]) & (place < (begin + length)[stretch]) | (drop < rates.drop)
    hidden = ~removed & (mask < rates.mask)
    emptied = ~np.logical_or.reduceat(~(removed | hidden), starts)
    saved = emptied[stretch] & (drop == np.maximum.reduceat(drop, starts)[stretch])
    kept[where], masked[where] = ~removed | saved, hidden & ~saved
    return order, kept, masked


def _like(original: Any, values: np.ndarray) -> Any:
    """Values in the type of a row's column: a tensor, an array or a list."""
    if isinstance(original, torch.Tensor):
        return torch.as_tensor(values, dtype=original.dtype)
    return values.astype(original.dtype) if isinstance(original, np.ndarray) else values.tolist()
