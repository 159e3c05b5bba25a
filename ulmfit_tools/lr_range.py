"""The learning-rate range test: one short training over rising rates, in the trainer's own steps, that leaves no trace.

Smith 2015 (arXiv:1506.01186), section 3.3: let the rate rise from very low to very high over a few updates, and see
where the loss begins to fall and where it stops. The test trains with a shallow copy of the trainer, so batches,
losses, mixed precision, accumulation and clipping are those of the real training, and puts back all that it changed.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, has_length

from ulmfit_tools.errors import InputError, nearest
from ulmfit_tools.layers import layer_groups
from ulmfit_tools.lr_curve import LRCurve, has_diverged
from ulmfit_tools.restoring import unchanged

logger = logging.getLogger(__name__)

MODES = ("exponential", "linear")
MIN_STEPS = 20  # fewer show a step or two in the part of the range that matters


def lr_range_test(
    trainer: Trainer,
    *,
    start_lr: float = 1e-7,
    end_lr: float = 10,
    num_steps: int = 100,
    mode: str = "exponential",
    eval_batches: int = 0,
    confirm: bool = False,
    offload_folder: str | Path | None = None,
) -> LRCurve:
    """Train for a few steps while the rate rises from very low to very high, and put everything back.

    All layer groups keep the ratios between their rates: one multiplier is swept over them, and the rates that are
    named are the head's, as everywhere. With `s` from 0 to `num_steps - 1`, step `s` is taken at

    - exponential: `start_lr * (end_lr / start_lr) ** (s / (num_steps - 1))`
    - linear: `start_lr + (end_lr - start_lr) * s / (num_steps - 1)`

    A loss belongs to the rate of the update before it. The test ends early when the loss has diverged. It runs with
    the layers that are trainable now and without the trainer's callbacks; nothing is logged, evaluated or saved.

    In a distributed run all processes must call it. The loss is averaged over them, so they decide alike.

    Args:
        trainer: A `Trainer` or `ULMFiTTrainer`, in one process or with DDP. It need not have trained yet.
        start_lr: The first rate of the last layer group, the head.
        end_lr: The last one.
        num_steps: Optimizer steps; with gradient accumulation each takes several batches.
        mode: "exponential" or "linear".
        eval_batches: Instead of the loss on the training batches, take the mean loss on this many batches of the
            evaluation set, the same ones after every step. Less noisy, at the cost of their forward passes.
        confirm: Train a few short probes around the suggestion as well, all from the same start, and suggest the
            best of them. How many steps this costs is logged before it begins.
        offload_folder: Keep the copy of the trainable weights in a temporary file in this folder; by default it is in
            the host's memory.

    Returns:
        The curve, with its suggestions.

    Raises:
        InputError: Settings out of range, nothing to train or to evaluate on, too few rows for a batch, or a loss that
            is not a number before the first update.
    """
    rates = sweep_rates(start_lr, end_lr, num_steps, mode)
    _check_trainer(trainer, eval_batches)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    holders = [trainer.data_collator, trainer.train_dataset, trainer.eval_dataset]
    with unchanged(trainer.model, optimizer, holders=holders, offload_folder=offload_folder) as rewind:
        curve = _sweep(trainer, optimizer, rates, eval_batches)
    return curve


def _sweep(trainer: Trainer, optimizer: Optimizer | None, rates: list[float], eval_batches: int) -> LRCurve:
    notes = _LossNotes(rates, eval_batches, has_diverged)
    start = time.perf_counter()
    _rehearse(trainer, optimizer, notes)
    seconds = time.perf_counter() - start
    measured = len(notes.losses) - 1
    return LRCurve(
        rates=tuple(rates[:measured]),
        losses=tuple(notes.losses[1:]),
        start_loss=notes.losses[0],
        stopped=notes.stopped,
        meta={"steps": notes.updates, "seconds": seconds},
    )


def sweep_rates(start_lr: float, end_lr: float, num_steps: int, mode: str) -> list[float]:
    """The rate of each step; see `lr_range_test`.

    Raises:
        InputError: A setting is out of its range.
    """
    if not 0 < start_lr < end_lr < math.inf:
        raise InputError(f"A sweep goes up: 0 < start_lr < end_lr. Received: start_lr={start_lr}, end_lr={end_lr}")
    if not isinstance(num_steps, int) or num_steps < MIN_STEPS:
        raise InputError(
            f"A range test needs at least {MIN_STEPS} steps; 100 is usual. Received: num_steps={num_steps}"
        )
    if mode not in MODES:
        raise InputError(f"mode is one of {', '.join(MODES)}.{nearest(mode, MODES)} Received: mode={mode!r}")
    shares = [step / (num_steps - 1) for step in range(num_steps)]
    if mode == "linear":
        return [start_lr + (end_lr - start_lr) * share for share in shares]
    return [start_lr * (end_lr / start_lr) ** share for share in shares]


def _check_trainer(trainer: Trainer, eval_batches: int) -> None:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise InputError(
            "The range test runs in one process or with DDP: with FSDP or DeepSpeed, run it before, alone"
        )
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
        raise InputError("The model has no trainable parameters, so no rate changes anything: thaw some layers first")
    if trainer.train_dataset is None:
        raise InputError("The range test trains, and the trainer has no train_dataset")
    batch = trainer.args.train_batch_size * trainer.args.world_size
    if has_length(trainer.train_dataset) and len(trainer.train_dataset) < batch:
        raise InputError(
            f"The training data is smaller than one batch of {batch}: use smaller batches or more rows. "
            f"Received: {len(trainer.train_dataset)} rows"
        )
    if eval_batches < 0:
        raise InputError(f"eval_batches counts batches, 0 for none. Received: eval_batches={eval_batches}")
    if eval_batches and (isinstance(trainer.eval_dataset, dict) or not has_length(trainer.eval_dataset)):
        found = "none" if trainer.eval_dataset is None else f"a {type(trainer.eval_dataset).__name__}"
        raise InputError(
            "eval_batches takes the loss on the trainer's eval_dataset, one dataset with a length: give it one or "
            f"leave eval_batches out. Received: eval_batches={eval_batches}, eval_dataset: {found}"
        )


class _LossNotes(TrainerCallback):
    """Notes the loss before the first update and after each one, and ends the run where it tells no more.

    Args:
        rates: The head's rate at each update.
        eval_batches: How many batches of the evaluation set the loss is taken on; 0 for the training batches.
        stops: Whether these losses, the first of them from before any update, say that the run should end.
    """

    def __init__(self, rates: Sequence[float], eval_batches: int, stops: Callable[[Sequence[float]], bool]) -> None:
        self.rates = rates
        self.eval_batches = eval_batches
        self.stops = stops
        self.losses: list[float] = []
        self.updates = 0
        self.stopped = "end"

    def attach(self, trainer: Trainer) -> None:
        """Watch a trainer, which then has a `training_step` of its own."""
        self._trainer = trainer
        self._train_losses: list[torch.Tensor] = []
        trainer_step = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
            self._train_losses.append(trainer_step(*args, **kwargs))
            return self._train_losses[-1]

        trainer.training_step = training_step  # type: ignore[method-assign]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Takes the evaluation loss before any update."""
        if self.eval_batches:
            self._batches = list(self._trainer.get_eval_dataloader(self._evaluated_rows(args)))
            self._note(self._evaluate(model), control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Takes the loss that goes with the step: the training batches saw the weights as they were before it."""
        training_loss, self._train_losses = torch.stack(self._train_losses).sum(), []
        if not self.eval_batches and len(self.losses) == self.updates:
            self._note(training_loss, control)
        if self._trainer.accelerator.optimizer_step_was_skipped:  # gradients in half precision were too large
            return
        self.updates += 1
        if self.eval_batches:
            self._note(self._evaluate(model), control)

    def _evaluated_rows(self, args: TrainingArguments) -> Any:
        """Rows from all over the evaluation set, in which similar ones may stand together."""
        dataset: Any = self._trainer.eval_dataset
        rows = min(len(dataset), self.eval_batches * args.eval_batch_size * args.world_size)
        chosen = [index * len(dataset) // rows for index in range(rows)]
        return dataset.select(chosen) if hasattr(dataset, "select") else Subset(dataset, chosen)

    def _evaluate(self, model: nn.Module) -> torch.Tensor:
        model.eval()
        losses = [self._trainer.prediction_step(model, batch, prediction_loss_only=True)[0] for batch in self._batches]
        return torch.stack(losses).mean()

    def _note(self, loss: torch.Tensor, control: TrainerControl) -> None:
        value = self._trainer.accelerator.reduce(loss.detach().float(), reduction="mean").item()
        if not math.isfinite(value):
            if not self.losses:
                raise InputError(
                    "The loss is not a number before the first update, which no rate can mend: look at the labels, "
                    f"the inputs and the precision. Received: loss={value}"
                )
            self.stopped, control.should_training_stop = "nan", True
            return
        self.losses.append(value)
        if self.stops(self.losses):
            self.stopped, control.should_training_stop = "diverged", True


def _rehearse(trainer: Trainer, optimizer: Optimizer | None, notes: _LossNotes) -> None:
    """Train a shallow copy of the trainer, at the rates of the notes and in all else as the trainer would.

    It shares the model and the data; what it does to them is for the caller to put back.
    """
    rehearsal = copy.copy(trainer)
    rehearsal.args = _quiet(trainer.args, len(notes.rates))
    rehearsal.create_accelerator_and_postprocess()  # with its own loss scale and lists of what it prepared
    rehearsal.model_init = None  # it would be called again, for the weights that are there already
    rehearsal.optimizer, rehearsal.lr_scheduler = optimizer, None
    rehearsal.control = TrainerControl()
    rehearsal.callback_handler = CallbackHandler(
        [DefaultFlowCallback, notes], trainer.model, trainer.processing_class, None, None
    )

    def create_scheduler(num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        swept = rehearsal.optimizer if optimizer is None else optimizer
        head, last = head_rate(trainer, swept), len(notes.rates) - 1
        rehearsal.lr_scheduler = LambdaLR(swept, lambda step: notes.rates[min(step, last)] / head)
        return rehearsal.lr_scheduler

    # On the copy alone, and before its class's own methods, whatever that class is.
    rehearsal.create_scheduler = create_scheduler  # type: ignore[method-assign]
    rehearsal.log = lambda logs, start_time=None: None  # type: ignore[method-assign]
    notes.attach(rehearsal)
    Trainer.train(rehearsal)  # a subclass's own `train` looks after signals and checkpoints


def _quiet(args: TrainingArguments, num_steps: int) -> TrainingArguments:
    """The same arguments for so many steps in which nothing is logged, evaluated, saved or pushed."""
    quiet = copy.copy(args)  # as it stands: its checks and what they derive have had their turn
    quiet.max_steps = num_steps
    quiet.eval_strategy = quiet.logging_strategy = IntervalStrategy.NO
    quiet.save_strategy = SaveStrategy.NO
    quiet.logging_first_step = quiet.eval_on_start = quiet.load_best_model_at_end = quiet.push_to_hub = False
    quiet.logging_nan_inf_filter = False  # the notes look at every loss anyway
    return quiet


def head_rate(trainer: Trainer, optimizer: Optimizer) -> float:
    """The rate that `learning_rate` names, before any schedule: that of the last layer group.

    Where the optimizer holds no parameter of that group, it is what the training arguments say.

    Raises:
        InputError: It is 0, and no multiple of 0 is a rate to be found.
    """
    head = {id(parameter) for parameter in layer_groups(trainer.model)[-1].parameters(trainer.model)}
    rates = [
        float(group.get("initial_lr", group["lr"]))
        for group in optimizer.param_groups
        if any(id(parameter) in head for parameter in group["params"])
    ]
    rate = max(rates, default=float(trainer.args.learning_rate))
    if not rate > 0:
        raise InputError(f"The range test multiplies the trainer's rates, so they must not be 0. Received: {rate}")
    return rate
