"""Training from precomputed activations: the frozen layers run once for each row, not once an epoch.

fast.ai's `precompute=True`, for any architecture whose blocks form a chain. `freeze_boundary` says how the rest of the
model runs, `frozen_pass` computes, and `activation_store` keeps the files. Frozen layers run without dropout.
"""

import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import align_special_tokens, has_length
from transformers.utils import logging

from ulmfit_tools.activation_store import DTYPES, Entry, all_or_none, in_use
from ulmfit_tools.data.numbered_rows import ROW
from ulmfit_tools.errors import InputError, nearest
from ulmfit_tools.freeze_boundary import Boundary, CannotPrecompute, find_boundary, in_batch, one_token, padded
from ulmfit_tools.freezing import keep_in_eval_mode
from ulmfit_tools.frozen_pass import CacheReport, FrozenPass, Source, slices

__all__ = ["CacheReport", "CannotPrecompute", "activation_cache", "precomputed"]

logger = logging.get_logger(__name__)

ACTIVATIONS = "cached_activations"  # what a batch carries beside the model's inputs and its rows' numbers


@contextmanager
def precomputed(
    trainer: Trainer,
    *,
    cache_dir: str | Path,
    dtype: str = "auto",
    to_come: Sequence[Collection[str]] = (),
) -> Iterator[CacheReport]:
    """Train and evaluate from the activations that leave the frozen layers, computed once and kept on disk.

    Inside, the trainer's datasets and collator are replaced and the frozen layers stand still; at the end all is as it
    was, but for the special tokens of the model's configuration, which are the tokenizer's, as after any training.
    With dropout off, losses, gradients and weights are those of the training without, but for the order of additions
    in batches that are padded otherwise; with dropout on, the frozen layers run without it. The rows come in the same
    order. When layers of the frozen part are thawed in the middle, or their weights change by a checkpoint or by what
    is written to them, training goes on through the layers. What is written through `.data` torch does not tell.

    Args:
        trainer: A `Trainer` with some blocks frozen from the input up. Several processes (DDP) share the work.
        cache_dir: The folder of the cache. What is there for the same weights, rows and settings is used.
        dtype: "float32", "float16", "bfloat16", or "auto": as the layers give them, which loses nothing.
        to_come: For trainings that follow, and until then leave those layers alone that are frozen in them: the names
            of the parameters that train. Their activations are kept from the same pass where the disk has room.

    Yields:
        What was done.

    Raises:
        CannotPrecompute: The activations cannot stand in for the frozen layers, or the dtype cannot hold them; the
            message says why.
        InputError: The dtype is unknown or the disk has no room.
    """
    if dtype not in (*DTYPES, "auto"):
        raise InputError(f"dtype is one of auto, {', '.join(DTYPES)}.{nearest(dtype, DTYPES)} Received: {dtype!r}")
    _check_trainer(trainer)
    model: Any = trainer.model
    if isinstance(trainer.processing_class, (PreTrainedTokenizerBase, ProcessorMixin)) and hasattr(model, "config"):
        align_special_tokens(model, trainer.processing_class)  # as `train` will: heads look for these tokens
    before = trainer.train_dataset, trainer.eval_dataset, trainer.data_collator
    evaluated = before[1] if isinstance(before[1], dict) else {None: before[1]}
    given = [data for data in (before[0], *evaluated.values()) if data is not None and has_length(data)]
    sources = [Source(data, trainer) for data in given]
    frozen_pass = FrozenPass(trainer, find_boundary(model), sources, Path(cache_dir))
    report = frozen_pass.make(dtype, _boundaries(model, to_come))
    with ExitStack() as held:
        with all_or_none(Path(cache_dir)) as meet:
            held.enter_context(in_use(frozen_pass.entries))
            meet()
        collator = _Collator(before[2], sources, frozen_pass.entries, frozen_pass.form)
        rows: dict[int, Any] = {id(data): collator.rows(number) for number, data in enumerate(given)}
        swapped = {name: rows.get(id(data), data) for name, data in evaluated.items()}
        keeper = _Keeper(frozen_pass, collator)
        hook = model.register_forward_pre_hook(keeper.hand_over, with_kwargs=True)
        try:
            trainer.train_dataset = rows[id(before[0])]
            trainer.eval_dataset = swapped if isinstance(before[1], dict) else swapped[None]
            trainer.data_collator = collator
            trainer.add_callback(keeper)
            keeper.begin()
            yield report
        finally:
            keeper.end()
            hook.remove()
            trainer.remove_callback(keeper)
            trainer.train_dataset, trainer.eval_dataset, trainer.data_collator = before


def activation_cache() -> Path:
    """The folder that plans keep activations in: `$ULMFIT_TOOLS_CACHE`, else `ulmfit_tools` in the user's cache."""
    own = os.environ.get("ULMFIT_TOOLS_CACHE")
    shared = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ulmfit_tools"
    return Path(own or shared) / "activations"


def _check_trainer(trainer: Trainer) -> None:
    if sys.platform == "win32":
        raise CannotPrecompute("Activations are precomputed on Linux and macOS; Windows lacks the locks for them")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.args.n_gpu > 1:
        raise CannotPrecompute("Activations are precomputed in one process or with DDP, one GPU for each process")
    if trainer.args.bf16_full_eval or trainer.args.fp16_full_eval:
        raise CannotPrecompute(
            "bf16_full_eval and fp16_full_eval change the frozen weights for an evaluation: use bf16 or fp16 alone"
        )
    if trainer.args.torch_compile:
        raise CannotPrecompute("A compiled model does not run from activations: leave torch_compile out")
    if trainer.model_init is not None:
        raise CannotPrecompute("model_init makes a new model for each training, and activations belong to one")
    if trainer.train_dataset is None or not has_length(trainer.train_dataset):
        raise CannotPrecompute("Activations are kept by row, so the training data needs numbered rows and a length")
    if getattr(trainer.data_collator, "augments", False):
        raise CannotPrecompute("The text is augmented, another one in each epoch, and so are its activations")
    if trainer.args.neftune_noise_alpha is not None:
        raise CannotPrecompute("NEFTune adds noise to the embeddings, another one in each step: nothing is kept")
    model: Any = trainer.model
    if any(getattr(module, "layerdrop", 0) for module in model.modules()):
        raise CannotPrecompute("LayerDrop leaves whole layers out, others in each step: set it to 0 in the model")


def _boundaries(model: nn.Module, to_come: Sequence[Collection[str]]) -> list[Boundary]:
    """Where the frozen part ends in trainings to come; in some of them nothing may be frozen."""
    found = []
    for trainable in to_come:
        with suppress(CannotPrecompute):
            found.append(find_boundary(model, trainable))
    return found


class _Collator:
    """Batches for the replay: the model's inputs with the rows' activations, and the rows' numbers.

    Rows of other datasets, whose activations nobody has kept, get the batches of the trainer's own collator.

    Args:
        collate: The trainer's own collator.
        sources: The datasets.
        entries: The activations of each.
        form: "vector": batches have one token a row, the one that is read; "sequence": all of them.
    """

    def __init__(self, collate: Any, sources: Sequence[Source], entries: Sequence[Entry], form: str) -> None:
        self._collate = collate
        self.sources = sources
        self.entries = entries
        self.replays = True
        self._first_rows = np.cumsum([0, *map(len, sources)])
        self._batches = (
            [_read_tokens(*pair) for pair in zip(sources, entries, strict=True)] if form == "vector" else []
        )

    def rows(self, number: int) -> "_RowNumbers":
        """What stands for the rows of the source of this number."""
        return _RowNumbers(self.sources[number], int(self._first_rows[number]))

    def __call__(self, features: list[Any]) -> Any:
        """A batch of rows of one source, given by their numbers, or of other rows."""
        if not isinstance(features[0], _RowNumber):
            return self._collate(features)
        numbers = torch.tensor(features)
        if not self.replays:
            return self.own_batch(numbers)
        place, rows = self._find(numbers)
        activations = self.entries[place].fetch(rows.numpy())
        if self._batches:
            batch = {name: values[rows] for name, values in self._batches[place].items()}
            return {**batch, ROW: numbers, ACTIVATIONS: activations[:, None]}
        batch = self.sources[place].batch(rows.tolist())
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        return {**batch, ROW: numbers, ACTIVATIONS: padded(activations, mask)}

    def own_batch(self, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """The batch as it would be without the cache."""
        place, rows = self._find(numbers)
        return self.sources[place].batch(rows.tolist())

    def _find(self, numbers: torch.Tensor) -> tuple[int, torch.Tensor]:
        place = int(np.searchsorted(self._first_rows, int(numbers[0]), side="right")) - 1
        return place, numbers - int(self._first_rows[place])


def _read_tokens(source: Source, entry: Entry) -> dict[str, torch.Tensor]:
    """For all rows of a source, the token that is read and the labels; by name, first dimension the rows."""
    parts: list[dict[str, torch.Tensor]] = []
    for rows in slices(np.arange(len(source)), 1000):
        batch = source.batch(rows)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        places = in_batch(entry.positions[rows], mask)
        labels = {name: values for name, values in batch.items() if name in source.label_names}
        parts.append(one_token(batch, places) | labels)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class _RowNumber(int):
    """A row's number, in the place of the row."""


class _RowNumbers(Dataset):
    """Row numbers in the place of rows: all that a data loader takes out of it.

    To a sampler, which looks at rows one by one, each of them has the length of the row and nothing else.
    """

    def __init__(self, source: Source, first: int) -> None:
        self._source = source
        self._numbers = [_RowNumber(first + row) for row in range(len(source))]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {self._source.counted: range(self._source.sampled_lengths[row])}

    def __getitems__(self, rows: Sequence[int]) -> list[_RowNumber]:
        return [self._numbers[row] for row in rows]


class _Keeper(TrainerCallback):
    """Hands the activations of a batch to the replay, and ends the replay when the frozen layers move.

    The embeddings still run meanwhile. They stay in eval mode, so that they draw no random numbers for dropout.
    """

    def __init__(self, frozen_pass: FrozenPass, collator: _Collator) -> None:
        self._pass = frozen_pass
        self._collator = collator
        still_run = {*frozen_pass.boundary.steps} - {*frozen_pass.boundary.blocks}
        self._modules = [name for name, _ in frozen_pass.model.named_modules() if name in still_run]
        parameters = frozen_pass.model.named_parameters()
        self._frozen = [parameter for name, parameter in parameters if frozen_pass.boundary.holds(name)]
        self._digests = frozen_pass.digests(frozen_pass.boundary)
        self._versions = self._count_changes()

    def begin(self) -> None:
        """Put the replay into the place of the frozen layers."""
        self._pass.replay.install()
        self._release = keep_in_eval_mode(self._pass.model, self._modules)

    def end(self) -> None:
        """Give the frozen layers their own forward and mode back."""
        if self._collator.replays:
            self._collator.replays = False
            self._pass.replay.remove()
            self._release()

    def hand_over(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the model's forward: looks at the layers, and takes out of the batch what is not the model's."""
        if self._collator.replays and self._count_changes() != self._versions:
            self._look("Weights of the frozen part were changed")
        activations, numbers = kwargs.pop(ACTIVATIONS, None), kwargs.pop(ROW, None)
        if self._collator.replays:
            self._pass.replay.activations = None if activations is None else activations.to(self._pass.dtype)
        elif activations is not None:  # it was collated before the replay ended
            own = self._collator.own_batch(numbers.cpu())
            kwargs |= {name: own[name].to(numbers.device) for name in own.keys() & kwargs.keys()}
        return args, kwargs

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks whether a checkpoint brought other weights for the frozen layers."""
        self._look("The checkpoint has other weights in the frozen layers")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks whether a layer of the frozen part trains now."""
        if any(parameter.requires_grad for parameter in self._frozen):
            self._drop("Layers of the frozen part were thawed")

    def _look(self, why: str) -> None:
        """Compare the frozen layers with what they were."""
        now = FrozenPass(self._pass.trainer, self._pass.boundary, [], self._pass.cache_dir)
        if now.digests(self._pass.boundary) != self._digests:
            self._drop(why)
        self._versions = self._count_changes()

    def _count_changes(self) -> list[int]:
        """How often each frozen weight was written to in place; torch has no public name for it."""
        return [parameter._version for parameter in self._frozen]

    def _drop(self, why: str) -> None:
        if self._collator.replays:
            logger.warning(f"{why}: training goes on through the layers, without precomputed activations.")
        self.end()
