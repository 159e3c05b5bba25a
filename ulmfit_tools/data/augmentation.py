"""Text augmentation on the fly: tokens masked, dropped, swapped or cut in spans, another way in each epoch.

What becomes of a row depends on the seed, the epoch and the row's number, and on nothing else: not on the batch, the
process or the data loader's worker that it is in, nor on how far a stream of random numbers has been used. So a run
that is resumed sees the same texts again.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import RemoveColumnsCollator, has_length

from ulmfit_tools.data.numbered_rows import ROW, numbered, used_columns, used_names
from ulmfit_tools.errors import InputError

_DRAWS = 6  # random numbers for each token, whatever the rates: one rate does not change what another does


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How much of a text is changed; every rate is a share of its ordinary tokens, from 0 to below 1.

    Special tokens and padding stay as they are. Each stretch of tokens between them, as each text of a pair, is
    changed by itself, keeps at least one of its own tokens, unmasked, and never grows; texts are told apart by special
    tokens and token types, and pairs of a tokenizer that makes neither are refused: in plans, and by `augmented` where
    it is told of pairs. Words of several tokens are not kept together. Several rates are applied in the order in which
    they stand here, and what is masked is a share of what is left.

    The default drops a tenth: it needs no mask token, and a tenth is the rate that the code of Wei & Zou 2019 (EDA,
    arXiv:1901.11196) has for each of its operations. Pretrained transformers gain less from such changes than models
    that are trained from nothing (Longpre et al. 2020, arXiv:2010.01764), so compare with a run without.

    Args:
        swap: The chance of a pair of neighbours to change places. Pairs do not overlap, so it is the share of tokens
            that move, too (EDA's random swap, kept local).
        span: The share of each text that is cut out in one piece, from a random place; of a short text, this share on
            average (Shen et al. 2020, arXiv:2009.13818, span cutoff, which overwrites it by zeros).
        drop: The chance of a token to be dropped (EDA's random deletion).
        mask: The chance of a token to be masked (Devlin et al. 2019, arXiv:1810.04805, section 3.1; as augmentation:
            SSMBA, Ng et al. 2020, arXiv:2009.10195).

    Raises:
        InputError: A rate is out of its range, or all are 0.
    """

    swap: float = 0.0
    span: float = 0.0
    drop: float = 0.0
    mask: float = 0.0

    def __post_init__(self) -> None:
        """Check the rates."""
        rates = dataclasses.asdict(self)
        for name, rate in rates.items():
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
                raise InputError(f"augment.{name} is a share from 0 to below 1. Received: {rate!r}")
        if not any(rates.values()):
            raise InputError(f"augment changes nothing: give one of {', '.join(rates)} a rate above 0, as drop: 0.1")

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, *, pairs: bool = False) -> None:
        """Refuse to mask without a mask token, and to change text pairs whose border is nowhere to be seen.

        Args:
            tokenizer: The tokenizer.
            pairs: Whether the rows are text pairs.

        Raises:
            InputError: The tokenizer has no mask token, or puts nothing between the texts of a pair.
        """
        if self.mask and tokenizer.mask_token_id is None:
            raise InputError(
                f"{type(tokenizer).__name__} has no mask token, so augment.mask cannot be. Use drop instead. "
                f"Received: mask={self.mask}"
            )
        if pairs and not _shows_pairs(tokenizer):
            raise InputError(
                f"{type(tokenizer).__name__} puts nothing between the two texts of a pair, so augment cannot tell "
                "them apart: train without it, or join the texts with a special token in one column"
            )


def _shows_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether special tokens or token types tell where the second text of a pair begins."""
    if tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False):
        return True
    return len({*tokenizer("a", "b").get("token_type_ids", ())}) > 1


def _put_around(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What a tokenizer puts around and between texts; it need not have a name for each, as for its `sep_token`."""
    pair = tokenizer("a", "b", return_special_tokens_mask=True)
    return {number for number, put in zip(pair["input_ids"], pair["special_tokens_mask"], strict=True) if put}


DEFAULT_AUGMENTATION = Augmentation(drop=0.1)


class AugmentingCollator:
    """Changes the numbered rows of a batch before another collator pads them; rows without a number stay as they are.

    Args:
        collate: The collator that makes the batch.
        augmentation: What is done.
        tokenizer: It knows the special tokens and the mask.
        seed: Decides, with the epoch and the row's number, what is done to a row.

    Raises:
        InputError: Tokens are to be masked and the tokenizer has no mask token.
    """

    augments = True

    def __init__(
        self,
        collate: Callable[[list[Any]], Any],
        augmentation: Augmentation,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
    ) -> None:
        augmentation.check_tokenizer(tokenizer)
        self.collate = collate
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # workers see it change, wherever they run
        self._names = list(tokenizer.model_input_names)
        self._mask_id = tokenizer.mask_token_id
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = np.array(sorted({*tokenizer.all_special_ids} | added | _put_around(tokenizer)), dtype=np.int64)

    def __call__(self, features: list[Any]) -> Any:
        """A batch."""
        places = [place for place, row in enumerate(features) if isinstance(row, Mapping) and ROW in row]
        if places:
            features = list(features)
            for place, row in zip(places, self._changed([features[place] for place in places]), strict=True):
                features[place] = row
        return self.collate(features)

    def _changed(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """All rows at once, their tokens one after another; what the tokenizer makes for each token goes with it."""
        names = [name for name in self._names if name in rows[0]]
        lengths = [len(row[names[0]]) for row in rows]
        columns = {name: np.concatenate([np.asarray(row[name], dtype=np.int64) for row in rows]) for name in names}
        ordinary = ~np.isin(columns[names[0]], self._special)
        if "attention_mask" in columns:
            ordinary &= columns["attention_mask"] != 0
        parts = [np.repeat(np.arange(len(rows)), lengths)]
        if "token_type_ids" in columns:
            parts.append(columns["token_type_ids"])
        draws = np.concatenate([self._draw(int(row[ROW]), length) for row, length in zip(rows, lengths, strict=True)])
        order, kept, masked = _edit(ordinary, parts, draws, self.augmentation)
        ends = np.r_[0, np.cumsum(kept)][np.r_[0, np.cumsum(lengths)]]
        changed = [{name: value for name, value in row.items() if name != ROW} for row in rows]
        for name, values in columns.items():
            values = values[order]
            if name == names[0] and masked.any():
                values[masked] = self._mask_id
            values = values[kept]
            for row, begin, end in zip(changed, ends[:-1], ends[1:], strict=True):
                row[name] = _like(row[name], values[begin:end])
        return changed

    def _draw(self, row: int, length: int) -> np.ndarray:
        """The random numbers of a row in this epoch, shape (length, draws): a longer row begins with the same ones."""
        generator = np.random.Generator(np.random.PCG64([self.seed, int(self.epoch), row]))
        return generator.random((length, _DRAWS), dtype=np.float32)


def _edit(
    ordinary: np.ndarray, parts: Sequence[np.ndarray], draws: np.ndarray, rates: Augmentation
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What to do with the tokens of some rows, one row after another.

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
    swap, drop, mask, shift, rounding, place_of_span = draws[where].T
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
    saved = emptied[stretch] & (drop == np.maximum.reduceat(drop, starts)[stretch])  # the last that would be dropped
    kept[where], masked[where] = ~removed | saved, hidden & ~saved
    return order, kept, masked


def _like(original: Any, values: np.ndarray) -> Any:
    """Values in the type of a row's column: a tensor, an array or a list."""
    if isinstance(original, torch.Tensor):
        return torch.as_tensor(values, dtype=original.dtype)
    return values.astype(original.dtype) if isinstance(original, np.ndarray) else values.tolist()


class _EpochTeller(TrainerCallback):
    """Tells the collator the epoch; in a run resumed in the middle of one it is the same."""

    def __init__(self, collator: AugmentingCollator) -> None:
        self._collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the data loader's workers get their first rows."""
        self._collator.epoch.fill_(int(state.epoch))


@contextmanager
def augmented(
    trainer: Trainer, augmentation: Augmentation, tokenizer: PreTrainedTokenizerBase, *, pairs: bool = False
) -> Iterator[None]:
    """Augment a trainer's training rows, and only those, for a while.

    Args:
        trainer: The trainer.
        augmentation: What is done.
        tokenizer: The tokenizer that made the rows.
        pairs: Whether the rows are text pairs, which token ids alone do not always tell. Most tokenizers mark the
            border (BERT's, RoBERTa's, T5's); one that does not, as GPT-2's, is then refused.

    Raises:
        InputError: The rows have no numbers, tokens are to be masked and the tokenizer has no mask token, or the rows
            are pairs and it puts nothing between them.
    """
    augmentation.check_tokenizer(tokenizer, pairs=pairs)
    if not has_length(trainer.train_dataset):
        raise InputError(
            "Augmentation goes by the number of a row, so the training data needs numbered rows and a length. "
            f"Received: {type(trainer.train_dataset).__name__}"
        )
    seed = trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed
    collate = trainer.data_collator
    if trainer.args.remove_unused_columns:  # from rows of any kind, as Trainer does it; the number is used by then
        collate = RemoveColumnsCollator(collate, [*used_names(trainer)])
    collator = AugmentingCollator(collate, augmentation, tokenizer, seed)
    before = trainer.train_dataset, trainer.eval_dataset, trainer.data_collator, trainer.args.remove_unused_columns
    teller = _EpochTeller(collator)
    try:
        trainer.train_dataset = numbered(used_columns(before[0], trainer))
        if isinstance(before[1], dict):
            trainer.eval_dataset = {name: used_columns(data, trainer) for name, data in before[1].items()}
        elif before[1] is not None:
            trainer.eval_dataset = used_columns(before[1], trainer)
        trainer.data_collator = collator
        trainer.args.remove_unused_columns = False
        trainer.add_callback(teller)
        yield
    finally:
        trainer.remove_callback(teller)
        trainer.train_dataset, trainer.eval_dataset, trainer.data_collator = before[:3]
        trainer.args.remove_unused_columns = before[3]
