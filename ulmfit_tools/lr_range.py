"""The learning-rate range test: a short training over rising rates, in the trainer's own steps, without a trace.

Smith 2015 (arXiv:1506.01186), section 3.3: let the rate rise from very low to very high over a few updates, and see
where the loss begins to fall and where it stops. The test trains with a shallow copy of the trainer, so batches,
losses, mixed precision, accumulation and clipping are those of the real training, and puts back all that it changed.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import has_length

from ulmfit_tools.checkpoints import write_json
from ulmfit_tools.errors import InputError, nearest
from ulmfit_tools.lr_curve import LRCurve, Probe
from ulmfit_tools.lr_readings import LENGTH_POWER, has_diverged
from ulmfit_tools.rehearsal import LossNotes, list_parameters, rehearse, unwrapped
from ulmfit_tools.restoring import unchanged
from ulmfit_tools.training_args import ULMFiTTrainingArguments

logger = logging.getLogger(__name__)

MODES = ("exponential", "linear")
# Of a test at whose curve nobody looks. After a head that is trained already, a hundred steps show that the loss rises
# and hardly that it falls: they found a third of the limit that 200 did.
PLAN_STEPS = 200
MIN_STEPS = 20  # fewer show a step or two in the part of the range that matters
# A short run likes a higher rate than a long one, so probes that lie closer would mislead; and classes that are
# learned slowly need some dozens of steps before a loss says anything (recipes/benchmarks/lr_suggestions.py).
PROBE_FACTORS, PROBE_STEPS = (0.25, 1.0, 4.0), 100


def lr_range_test(
    trainer: Trainer,
    *,
    start_lr: float = 1e-7,
    end_lr: float = 10,
    num_steps: int = 100,
    mode: str = "exponential",
    eval_batches: int = 0,
    num_sweeps: int | None = 1,
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

    What it puts back, and the little that it cannot, as numbers in a trainer's own tensors that are no parameters and
    no buffers, is listed in `restoring.unchanged`.

    In a distributed run all processes must call it. The loss is averaged over them, so they decide alike.

    Args:
        trainer: A `Trainer` or `ULMFiTTrainer`, in one process or with DDP. It need not have trained yet.
        start_lr: The first rate of the last layer group, the head. Steps at rates next to nothing are not lost: they
            show where the loss begins, and a sweep without them finds too high a limit (recipes/benchmarks).
        end_lr: The last one.
        num_steps: Optimizer steps; with gradient accumulation each takes several batches.
        mode: "exponential" or "linear".
        eval_batches: Instead of the loss on the training batches, take the mean loss on this many batches of the
            evaluation set, the same ones after every step. Less noisy, at the cost of their forward passes.
        num_sweeps: How often to sweep, each time from the same start on other batches; the suggestions are geometric
            means over them. What a single one suggests depends on the batches that it meets, by a standard deviation
            of a factor of about 1.1. The batches come in another order where that is drawn from the trainer's seed or,
            as in a shuffled stream of `datasets`, from the epoch; where a sweep meets the same ones again, only the
            first counts. None takes two where the training is at least as long as both, and else one.
        confirm: Train three short probes as well, at a fourth of the suggestion, at it and at four times it, all from
            the same start, and suggest the best of them: another than the first suggestion where its loss is lower by
            more than two standard errors of the difference, batch by batch. It is for a suggestion that may be far
            off, as on a noisy curve. One that is about right it mostly leaves alone, but a short run likes a higher
            rate than a long one (recipes/benchmarks has figures). What this costs is logged before it begins.
        offload_folder: Keep the copy of the trainable weights, and the state of an optimizer that has trained before,
            in temporary files in this folder; by default they are in the host's memory.

    Returns:
        The curve, with its suggestions.

    Raises:
        InputError: Settings out of range, nothing to train or to evaluate on, an optimizer of other parameters, too
            few rows for a batch (of a stream nobody knows), or a loss that is not a number before the first update.
    """
    rates = sweep_rates(start_lr, end_lr, num_steps, mode)
    if num_sweeps is not None and (not isinstance(num_sweeps, Integral) or num_sweeps < 1):
        raise InputError(f"num_sweeps is a whole number from 1. Received: num_sweeps={num_sweeps!r}")
    _check_trainer(trainer)
    _check_evaluation(trainer, eval_batches)
    if offload_folder is not None and not Path(offload_folder).is_dir():
        raise InputError(f"offload_folder is a folder that exists. Received: offload_folder={str(offload_folder)!r}")
    optimizer = None if trainer.optimizer is None else unwrapped(trainer.optimizer)
    list_parameters(trainer)
    start = time.perf_counter()
    with unchanged(_model(trainer), optimizer, holders=[trainer], offload_folder=offload_folder) as rewind:
        sweeps: list[LRCurve] = []
        while not sweeps or len(sweeps) < (num_sweeps or _sweeps_of(sweeps[0], num_steps)):
            if sweeps:
                rewind()
            of = f" of {num_sweeps}" if num_sweeps else ""
            title = "Range test" if num_sweeps == 1 else f"Range test {len(sweeps) + 1}{of}"
            with _progress(trainer, title, num_steps) as bar:
                notes = LossNotes(rates, eval_batches, has_diverged, bar.update)
                sweeps.append(_curve(rehearse(trainer, optimizer, notes, len(sweeps)), mode))
            if len(sweeps) > 1 and sweeps[-1].losses == sweeps[0].losses:
                logger.warning(
                    "Another sweep met the same batches in the same order, so only the first one counts: a loader of "
                    "one's own, or a stream that is not shuffled, has no others."
                )
                break
        others = [sweep for sweep in sweeps[1:] if sweep.losses != sweeps[0].losses]
        curve = replace(sweeps[0], steps=sum(sweep.steps for sweep in sweeps), repeats=tuple(others))
        if confirm:
            curve = _confirmed(curve, trainer, optimizer, eval_batches, rewind)
    return replace(curve, seconds=time.perf_counter() - start)


def _sweeps_of(first: LRCurve, num_steps: int) -> int:
    """How many sweeps a training is worth: two, where it is at least as long as both."""
    return 2 if 2 * num_steps <= first.training_steps else 1


def _progress(trainer: Trainer, title: str, steps: int) -> Any:
    """A bar of so many steps, where the trainer shows its own; a sweep that ends early leaves it where it is."""
    hidden = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
    return tqdm(total=steps, desc=title, unit="step", disable=hidden, leave=False)


def _curve(notes: LossNotes, mode: str) -> LRCurve:
    """What a sweep has noted."""
    measured = len(notes.losses) - 1
    return LRCurve(
        rates=tuple(notes.rates[:measured]),
        losses=tuple(notes.losses[1:]),
        start_loss=notes.losses[0],
        training_steps=notes.training_steps,
        stopped=notes.stopped,
        mode=mode,
        loss_on="evaluation" if notes.eval_batches else "training",
        steps=notes.updates,
        rate_norm=notes.rate_norm,
        width=notes.width,
        label_entropy=notes.label_entropy,
        batch_size=notes.batch_size,
    )


def find_learning_rate(
    trainer: Trainer,
    record: str | Path,
    *,
    num_steps: int = PLAN_STEPS,
    num_sweeps: int | None = None,
    **settings: Any,
) -> LRCurve:
    """Give a trainer the rate that a range test suggests; the test is run once and its curve kept in a file.

    A run that is resumed calls this again and gets the rate that stands in the file. Where no rate in the range is
    too high, the trainer keeps the rate that it has. All processes must call it.

    Args:
        trainer: A trainer that has not made its optimizer yet, at the weights from which it is to train.
        record: The JSON file of the curve.
        num_steps: As in `lr_range_test`, but twice as many: a plan asks nobody about a noisy curve, and where the head
            is trained already the loss falls little.
        num_sweeps: As in `lr_range_test`, but by the length of the training.
        **settings: As in `lr_range_test`.

    Returns:
        The curve.

    Raises:
        InputError: As in `lr_range_test`, or the file holds something else.
    """
    path = Path(record)
    found = [path.read_text(encoding="utf-8") if trainer.is_world_process_zero() and path.is_file() else None]
    broadcast_object_list(found)
    if found[0] is not None:
        curve = LRCurve.from_json(found[0])
        rate = json.loads(found[0])["read"].get("taken", _rate_to_take(curve, trainer))  # by the rule of its time
    else:
        curve = lr_range_test(trainer, num_steps=num_steps, num_sweeps=num_sweeps, **settings)
        rate = _rate_to_take(curve, trainer)
        if trainer.is_world_process_zero():
            values = json.loads(curve.to_json())
            values["read"]["taken"] = rate
            write_json(path, values)
        if curve.has_limit:
            logger.warning(f"Learning rate {rate:.2e} (confidence {curve.confidence}). {curve.verdict}")
        else:
            logger.warning(f"Learning rate {rate:.2e}, the one in the settings: no rate was too high. {curve.verdict}")
    set_learning_rate(trainer.args, rate)
    return curve


def _rate_to_take(curve: LRCurve, trainer: Trainer) -> float:
    """What the curve suggests; where no rate was too high, it has nothing to say against the rate in the settings."""
    return curve.suggestion if curve.has_limit else trainer.args.learning_rate


def set_learning_rate(args: TrainingArguments, learning_rate: float) -> None:
    """Put another rate for the head into training arguments; rates given for other layer groups keep their ratio."""
    factor = learning_rate / args.learning_rate
    args.learning_rate = learning_rate
    if isinstance(args, ULMFiTTrainingArguments):
        if args.learning_rate_low is not None:
            args.learning_rate_low *= factor
        if args.group_learning_rates is not None:
            args.group_learning_rates = [rate * factor for rate in args.group_learning_rates]


def _confirmed(
    curve: LRCurve, trainer: Trainer, optimizer: Optimizer | None, eval_batches: int, rewind: Callable[[], None]
) -> LRCurve:
    """Short trainings at rates around the suggestion, all of them from the same start and on the same batches.

    A probe takes half of the training's steps, or fewer. One of n steps stands for a training of T at its rate, with a
    peak `(T / n) ** (1 / 3)` times as high, as in `lr_readings.endurance`, in the same form: a rise over a tenth of
    its steps, and a fall to 0.
    """
    steps = min(PROBE_STEPS, max(curve.training_steps // 2, 4))
    logger.warning(
        f"Confirming the rate {curve.suggestion:.1e}: {len(PROBE_FACTORS)} probes of {steps} optimizer steps, "
        f"{len(PROBE_FACTORS) * steps} more than the {curve.steps} of the sweep."
    )
    shape = [min((step + 1) / (steps / 10), (steps - step) / (steps * 0.9), 1.0) for step in range(steps)]
    longer = max(curve.training_steps / steps, 1.0) ** LENGTH_POWER
    ends, taken = {}, curve.steps
    for factor in PROBE_FACTORS:
        rewind()
        rate = curve.suggestion * factor
        peak = rate * longer
        with _progress(trainer, f"Probe of {rate:.1e}", steps) as bar:
            rates = [peak * share for share in shape]
            notes = rehearse(trainer, optimizer, LossNotes(rates, eval_batches, lambda losses: False, bar.update))
        ends[rate] = np.array(notes.losses[-(steps // 4) :] if notes.stopped == "end" else [math.nan])
        taken += notes.updates
    probes = [
        Probe(
            rate=rate,
            peak=rate * longer,
            loss=None if np.isnan(end).any() else float(end.mean()),
            error=_error_of_mean(end - ends[curve.suggestion]),
        )
        for rate, end in ends.items()
    ]
    return replace(curve, probes=tuple(probes), steps=taken)


def _error_of_mean(differences: np.ndarray) -> float:
    """The standard error of their mean; 0 where there are too few, or some are not numbers."""
    error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return error if math.isfinite(error) else 0.0


def sweep_rates(start_lr: float, end_lr: float, num_steps: int, mode: str) -> list[float]:
    """The rate of each step; see `lr_range_test`.

    Raises:
        InputError: A setting is out of its range.
    """
    numbers = isinstance(start_lr, Real) and isinstance(end_lr, Real)  # YAML takes 1e-5 for a text
    if not numbers or not 0 < start_lr < end_lr < math.inf:
        raise InputError(
            f"A sweep goes up, from one number to another: 0 < start_lr < end_lr. Received: start_lr={start_lr!r}, "
            f"end_lr={end_lr!r}"
        )
    if not isinstance(num_steps, Integral) or num_steps < MIN_STEPS:
        raise InputError(
            f"A range test needs at least {MIN_STEPS} steps, a whole number; 100 is usual. Received: "
            f"num_steps={num_steps!r}"
        )
    if mode not in MODES:
        raise InputError(f"mode is one of {', '.join(MODES)}.{nearest(mode, MODES)} Received: mode={mode!r}")
    start_lr, end_lr = float(start_lr), float(end_lr)
    shares = [step / (num_steps - 1) for step in range(num_steps)]
    if mode == "linear":
        return [start_lr + (end_lr - start_lr) * share for share in shares]
    return [start_lr * (end_lr / start_lr) ** share for share in shares]


def _model(trainer: Trainer) -> nn.Module:
    """The trainer's model, which it has from its beginning to its end."""
    assert isinstance(trainer.model, nn.Module)
    return trainer.model


def _check_trainer(trainer: Trainer) -> None:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise InputError(
            "The range test runs in one process or with DDP: with FSDP or DeepSpeed, run it before, alone"
        )
    if not any(parameter.requires_grad for parameter in _model(trainer).parameters()):
        raise InputError("The model has no trainable parameters, so no rate changes anything: thaw some layers first")
    # A loader of one's own makes batches of its own, whatever the arguments say.
    own_loader = trainer.get_train_dataloader.__module__.split(".")[0] not in ("transformers", "ulmfit_tools")
    if has_length(trainer.train_dataset) and not own_loader:
        check_rows(len(trainer.train_dataset), trainer.args)


def check_rows(rows: int, args: TrainingArguments) -> None:
    """Refuse training data smaller than a batch, whose loss would be of other rows than a training's.

    Raises:
        InputError: They are fewer.
    """
    batch = args.train_batch_size * args.world_size
    if rows < batch:
        raise InputError(
            f"The training data is smaller than one batch of {batch}: use smaller batches or more rows. "
            f"Received: {rows} rows"
        )


def _check_evaluation(trainer: Trainer, eval_batches: int) -> None:
    if not isinstance(eval_batches, Integral) or eval_batches < 0:
        raise InputError(
            f"eval_batches counts batches, a whole number, 0 for none. Received: eval_batches={eval_batches!r}"
        )
    dataset: Any = trainer.eval_dataset
    if eval_batches and (isinstance(dataset, dict) or not has_length(dataset) or not len(dataset)):
        found = "none" if dataset is None else f"a {type(dataset).__name__}"
        found += " without rows" if has_length(dataset) and not len(dataset) else ""
        raise InputError(
            "eval_batches takes the loss on the trainer's eval_dataset, one dataset with a length: give it one or "
            f"leave eval_batches out. Received: eval_batches={eval_batches}, eval_dataset: {found}"
        )
