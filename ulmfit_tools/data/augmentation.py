"""Text augmentation on the fly: tokens masked, dropped, swapped or cut in spans, another way in each epoch.

What becomes of a row depends on the seed, the epoch and the row's number, and on nothing else: not on the batch, the
process or the data loader's worker that it is in, nor on how far a stream of random numbers has been used. So a run
that is resumed sees the same texts again.
"""

import dataclasses
from collections.abc import Callable, Iterator
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

from ulmfit_tools.data.numbered_rows import ROW, numbered, used_columns
from ulmfit_tools.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How much of a text is changed; every rate is a share of its ordinary tokens, from 0 to below 1.

    Special tokens stay where they are, and nothing crosses from one text of a pair to the other. At least one ordinary
    token of each text stays, and a text never grows. They are applied in the order in which they stand here.

    The default drops a tenth: it needs no mask token, and a tenth is what Wei & Zou 2019 (EDA, arXiv:1901.11196,
    section 5) advise for a few thousand texts. Pretrained transformers gain less from such changes than models that
    are trained from nothing (Longpre et al. 2020, arXiv:2010.01764), so compare with a run without.

    Args:
        swap: The chance of a token to change places with its neighbour (EDA's random swap, kept local).
        mask: The chance of a token to be masked (Devlin et al. 2019, arXiv:1810.04805, section 3.1).
        span: The share of each text that is cut out in one piece (Shen et al. 2020, arXiv:2009.13818, span cutoff).
        drop: The chance of a token to be dropped (EDA's random deletion).

    Raises:
        InputError: A rate is out of its range, or all are 0.
    """

    swap: float = 0.0
    mask: float = 0.0
    span: float = 0.0
    drop: float = 0.0

    def __post_init__(self) -> None:
        """Check the rates."""
        rates = dataclasses.asdict(self)
        for name, rate in rates.items():
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
                raise InputError(f"augment.{name} is a share from 0 to below 1. Received: {rate!r}")
        if not any(rates.values()):
            raise InputError(f"augment changes nothing: give one of {', '.join(rates)} a rate above 0, as drop: 0.1")


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
        if augmentation.mask and tokenizer.mask_token_id is None:
            raise InputError(
                f"{type(tokenizer).__name__} has no mask token, so augment.mask cannot be. Use drop instead. "
                f"Received: mask={augmentation.mask}"
            )
        self.collate = collate
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # workers see it change, wherever they run
        self._mask_id = tokenizer.mask_token_id
        self._special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """A batch."""
        return self.collate([self._changed(row) if ROW in row else row for row in features])

    def _changed(self, row: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in row.items() if name != ROW}
        # Philox takes any key for a stream of its own, so neighbouring rows have nothing in common.
        key = [self.seed * 1_000_003 + int(self.epoch), row[ROW]]
        generator = np.random.Generator(np.random.Philox(key=key))
        ids = np.array(kept["input_ids"], dtype=np.int64)
        new_ids, places = self.change(ids, np.asarray(kept.get("token_type_ids", np.zeros_like(ids))), generator)
        aligned = [n for n, v in kept.items() if n != "input_ids" and hasattr(v, "__len__") and len(v) == len(ids)]
        moved = {name: np.asarray(kept[name])[places].tolist() for name in aligned}
        return {**kept, **moved, "input_ids": new_ids.tolist()}

    def change(
        self, ids: np.ndarray, types: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """One row's tokens after the augmentation.

        Args:
            ids: Token ids, shape (tokens,).
            types: Token type ids, shape (tokens,); a text ends where they change, as it does at a special token.
            generator: The row's random numbers.

        Returns:
            The new ids, and the places in the old row that they stand at, ascending; shape (new tokens,) each.
        """
        rates = self.augmentation
        ids = ids.copy()
        special = np.isin(ids, self._special)
        if special.all():
            return ids, np.arange(len(ids))
        starts = np.r_[True, (special[1:] != special[:-1]) | (types[1:] != types[:-1])] | special
        text = np.cumsum(starts)  # the number of the text that each token belongs to
        chance = generator.random((3, len(ids)))
        if rates.swap:
            pairs = np.flatnonzero((chance[0, :-1] < rates.swap) & (text[1:] == text[:-1]) & ~special[:-1])
            for place in pairs:
                ids[[place, place + 1]] = ids[[place + 1, place]]
        if rates.mask:
            ids[~special & (chance[1] < rates.mask)] = self._mask_id
        keep = special | (chance[2] >= rates.drop)
        for number in np.unique(text[~special]):
            members = np.flatnonzero(text == number)
            cut = round(rates.span * len(members))
            first = generator.integers(len(members) - cut + 1)
            keep[members[first : first + cut]] = False
            if not keep[members].any():
                keep[members[generator.integers(len(members))]] = True
        return ids[keep], np.flatnonzero(keep)


class _EpochTeller(TrainerCallback):
    """Tells the collator the epoch; in a run resumed in the middle of one it is the same."""

    def __init__(self, collator: AugmentingCollator) -> None:
        self._collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the data loader's workers get their first rows."""
        self._collator.epoch.fill_(int((state.epoch or 0.0) + 1e-6))


@contextmanager
def augmented(trainer: Trainer, augmentation: Augmentation, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Augment a trainer's training rows, and only those, for a while.

    Args:
        trainer: The trainer.
        augmentation: What is done.
        tokenizer: The tokenizer that made the rows.
    """
    seed = trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed
    collator = AugmentingCollator(trainer.data_collator, augmentation, tokenizer, seed)
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
