"""Running one phase of a plan: its trainer, its training from the last good checkpoint, and what it leaves behind."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

from ulmfit_tools.callbacks import StopWhenOverfit
from ulmfit_tools.checkpoints import NoGoodCheckpoint, clean_up, list_checkpoints, whole_folder
from ulmfit_tools.data.augmentation import augmented
from ulmfit_tools.errors import InputError
from ulmfit_tools.evaluations import Cycles, cycle_evaluations, falls_short, is_last_of_cycle
from ulmfit_tools.feature_cache import CacheReport, activation_cache, precomputed
from ulmfit_tools.freezing import set_trainable, trainable_names
from ulmfit_tools.layers import layer_groups
from ulmfit_tools.lr_range import find_learning_rate, set_learning_rate
from ulmfit_tools.param_groups import group_learning_rates
from ulmfit_tools.plans.handover import handed_on, tidy
from ulmfit_tools.plans.phase import Phase
from ulmfit_tools.plans.record import RunFolder
from ulmfit_tools.plans.results import PhaseResult, clean_metrics
from ulmfit_tools.plans.watch import PhaseWatch, are_finite, diverged
from ulmfit_tools.trainer import ULMFiTTrainer, ULMFiTTrainingArguments, learning_rate_setting, optimizer_of_arguments

logger = logging.get_logger(__name__)


@dataclass
class Job:
    """What every phase of a run needs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    splits: Any
    folder: RunFolder
    phases: list[Phase]
    phase_args: list[ULMFiTTrainingArguments]
    compute_metrics: Callable
    callbacks: Sequence[TrainerCallback]
    compute_loss_func: Callable | None = None


def phase_trainer(job: Job, index: int) -> ULMFiTTrainer:
    """A trainer for one phase: its groups trainable, its rates and length in the arguments."""
    phase, args = job.phases[index], job.phase_args[index]
    groups = layer_groups(job.model)
    set_trainable(job.model, groups, phase.groups_to_train(groups.names))
    callbacks = [*job.callbacks, _PhaseClock(job.folder, index, phase.name), _ResumeNote(job, index)]
    cycles = _cycles(args.schedule_settings) if args.schedule_name == "sgdr" else None
    if phase.until_overfit is not None:
        until = phase.until_overfit
        callbacks.append(StopWhenOverfit(patience=until.patience, min_delta=until.min_delta, cycles=cycles))
    return _PhaseTrainer(
        cycles,
        model=job.model,
        args=args,
        train_dataset=job.splits["train"],
        eval_dataset=job.splits.get("validation"),
        processing_class=job.tokenizer,
        data_collator=DataCollatorWithPadding(job.tokenizer, pad_to_multiple_of=8 if args.fp16 or args.bf16 else None),
        compute_loss_func=job.compute_loss_func,
        compute_metrics=job.compute_metrics,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=optimizer_of_arguments(args, trainable_only=True),
    )


class _PhaseTrainer(ULMFiTTrainer):
    """A trainer whose best weights, under warm restarts, are those of the end of a cycle.

    In between, the rate is high and the weights are on their way: that one of them is best on the validation rows is
    chance more often than not. Loshchilov & Hutter 2016 (arXiv:1608.03983), section 3, recommend the end of the last
    cycle. The end of the training counts too. And of accuracies that only chance tells apart the last one is kept, as
    it has trained longest. On 1,500 rows of TREC, where 546 others chose the end of an earlier cycle, that was
    0.7 and 1.0 points worse than the end of the last, on 3,406 held-out rows (two of three seeds).
    """

    def __init__(self, cycles: Cycles | None, **settings: Any) -> None:
        self._cycles = cycles
        super().__init__(**settings)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if not self._weights_may_be_kept():
            return False
        return super()._determine_best_metric(metrics, trial) or self._is_later_and_as_good(metrics)

    def _is_later_and_as_good(self, metrics: dict[str, float]) -> bool:
        state, cycles, rows = self.state, self._cycles, cast(Sized, self.eval_dataset)
        best_by = self.args.metric_for_best_model or ""
        if cycles is None or best_by.removeprefix("eval_") != "accuracy":
            return False
        share = metrics["eval_accuracy"]
        ends = [value for _, value in cycle_evaluations(state.log_history, "accuracy", cycles)]
        if falls_short(share, max(ends, default=share), len(rows)):
            return False
        state.best_metric, state.best_global_step = share, state.global_step
        return True

    def _weights_may_be_kept(self) -> bool:
        state, cycles, epoch = self.state, self._cycles, self._steps_per_epoch
        if cycles is None or state.global_step >= state.max_steps:
            return True
        steps = epoch if self.args.eval_strategy == "epoch" else state.eval_steps
        at, interval = (state.global_step, steps) if cycles.unit == "step" else (state.epoch or 0, steps / epoch)
        return is_last_of_cycle(at, interval, cycles)


def _cycles(settings: Mapping[str, Any]) -> Cycles:
    """The cycles of SGDR with these settings, which are those of `schedules.get_schedule`."""
    mult = settings.get("cycle_mult", 1)
    if "cycle_steps" in settings:
        return Cycles(length=settings["cycle_steps"], mult=mult, unit="step")
    return Cycles(length=settings.get("cycle_len", 1), mult=mult)


def run_phase(job: Job, index: int, trainer: ULMFiTTrainer, before: PhaseResult | None) -> PhaseResult:
    """Train one phase, from its last good checkpoint where there is one, and record it.

    Args:
        job: The run.
        index: The phase's 0-based place.
        trainer: Its trainer, with the weights from which the phase starts.
        before: The result of the phase before; None for the first.

    Raises:
        InputError: The weights that it came to are worthless, or the metric by which the best are kept is missing.
    """
    phase = job.phases[index]
    here = job.folder.phase_folder(index, phase.name)
    with ExitStack() as stack:
        if phase.augment is not None:
            stack.enter_context(augmented(trainer, phase.augment, job.tokenizer))
        report = _precompute(job, index, trainer, stack) if phase.precompute else None
        _settle_rate(phase, trainer, here, before)
        logger.warning(_rates_in_words(trainer))
        best_by = next((args.metric_for_best_model for args in job.phase_args if args.load_best_model_at_end), None)
        trainer.add_callback(PhaseWatch(phase.name, best_by))
        _train(phase, trainer, here)
        if phase.keep == "best":
            logger.warning(_end_in_words(phase, trainer))
        metrics = _kept_metrics(trainer)
    if not (math.isfinite(metrics["loss"]) if metrics else are_finite(job.model)):
        raise diverged(phase.name, trainer.args, trainer.state, "the loss is no number")
    clock = next(c for c in trainer.callback_handler.callbacks if isinstance(c, _PhaseClock))
    result = PhaseResult(
        name=phase.name,
        trains=trains(job, phase)[0],
        learning_rate=_rate(trainer.args),
        epochs=round(trainer.state.epoch or 0.0, 4),
        steps=trainer.state.global_step,
        seconds=round(clock.seconds(), 1),
        metrics=metrics,
        precomputed=None if report is None else dataclasses.asdict(report),
    )
    if trainer.args.should_save:
        with whole_folder(handed_on(job.folder, job.phases, index)) as staging:
            trainer.save_model(str(staging))
        trainer.save_state()
        values = dataclasses.asdict(result)
        job.folder.write_phase_state(
            index, phase.name, {"status": "done", "seconds": result.seconds, "result": values}
        )
        tidy(job.folder, job.phases, index)
    trainer.accelerator.wait_for_everyone()
    return result


def _precompute(job: Job, index: int, trainer: ULMFiTTrainer, stack: ExitStack) -> CacheReport | None:
    """Have the trainer train from activations until the stack is closed; None, said aloud, where it cannot."""
    names = layer_groups(job.model).names
    lowest = [min(phase.groups_to_train(names)) for phase in job.phases]
    # What is frozen in a phase to come is the same as now where no phase until then trains below it.
    coming = [
        later
        for later in range(index + 1, len(job.phases))
        if job.phases[later].precompute and min(lowest[index:later]) >= lowest[later]
    ]
    groups = layer_groups(job.model)
    to_come = [trainable_names(job.model, groups, job.phases[later].groups_to_train(names)) for later in coming]
    try:
        return stack.enter_context(precomputed(trainer, cache_dir=activation_cache(), to_come=to_come))
    except InputError as why:
        logger.warning(f"Phase '{job.phases[index].name}' trains without precomputed activations. {why}")
        return None


def _train(phase: Phase, trainer: ULMFiTTrainer, here: Path) -> None:
    """Train to the end, from the last good checkpoint where there is one."""
    if trainer.is_world_process_zero():
        clean_up(here)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.train(resume_from_checkpoint=bool(list_checkpoints(here)))
    except NoGoodCheckpoint as none_left:
        logger.warning(f"Phase '{phase.name}' starts anew from the weights of the phase before. {none_left}")
        trainer.train()


def _settle_rate(phase: Phase, trainer: ULMFiTTrainer, here: Path, before: PhaseResult | None) -> None:
    """Give the trainer the rate that a phase names by a word."""
    if phase.learning_rate == "auto":
        find_learning_rate(trainer, here / "lr_range.json")  # kept there: a resumed phase reads it
    elif phase.learning_rate == "previous" and before is not None:
        rate = before.learning_rate
        set_learning_rate(trainer.args, rate[-1] if isinstance(rate, (list, tuple)) else rate)
    else:
        return
    trainer.optimizer_cls_and_kwargs = optimizer_of_arguments(trainer.args, trainable_only=True)


def _rates_in_words(trainer: ULMFiTTrainer) -> str:
    """The rates at which the layer groups train, from the first to the last."""
    args, model = trainer.args, trainer.model
    groups = layer_groups(model, args.num_layer_groups)
    rates = group_learning_rates(len(groups), learning_rate_setting(args), factor=args.discriminative_factor)
    trained = [
        (group.name, rate)
        for group, rate in zip(groups, rates, strict=True)
        if any(parameter.requires_grad for parameter in group.parameters(model))
    ]
    (first, low), (last, high) = trained[0], trained[-1]
    rising = f"{low:.1e} ({first}) to " if low != high else ""
    return f"Learning rate at its peak: {rising}{high:.1e} ({last}), {len(trained)} of {len(groups)} groups"


def _end_in_words(phase: Phase, trainer: ULMFiTTrainer) -> str:
    """Why a phase that keeps its best weights has ended, and which these are."""
    state, until = trainer.state, phase.until_overfit
    why = ""
    if until is not None:
        stopper = next(c for c in trainer.callback_handler.callbacks if isinstance(c, StopWhenOverfit))
        overfit = stopper.has_overfit(state)
        why = ": the validation loss has turned up" if overfit else f", with max_epochs={until.max_epochs:g}"
    kept = f"the best weights are those of step {state.best_global_step} of {state.global_step}"
    return f"Phase '{phase.name}' ends after {state.epoch or 0:g} epochs{why}; {kept}"


def _rate(args: ULMFiTTrainingArguments) -> Any:
    return args.learning_rate if args.learning_rate_low is None else (args.learning_rate_low, args.learning_rate)


def _kept_metrics(trainer: ULMFiTTrainer) -> dict[str, float]:
    """Validation metrics of the weights that go on: those logged at their step, evaluated now where there are none."""
    if trainer.eval_dataset is None:
        return {}
    best = trainer.args.load_best_model_at_end
    step = trainer.state.best_global_step if best else trainer.state.global_step
    logged = [entry for entry in trainer.state.log_history if entry.get("step") == step and "eval_loss" in entry]
    return clean_metrics(logged[-1] if logged else trainer.evaluate())


def trains(job: Job, phase: Phase) -> tuple[tuple[str, ...], str]:
    """The names of the layer groups that a phase trains, and the same for people."""
    names = layer_groups(job.model).names
    trained = tuple(names[i] for i in phase.groups_to_train(names))
    if len(trained) == len(names):
        return trained, f"all {len(names)} layer groups"
    if len(trained) < 4:
        return trained, ", ".join(trained)
    return trained, f"{trained[0]} to {trained[-1]} ({len(trained)} groups)"


def release(trainer: ULMFiTTrainer) -> None:
    """Undo what Accelerate did to the model, so that the next phase is prepared from the bare one.

    Accelerate takes a model that bears its mark for prepared: the next phase would train without autocast. And its own
    way back takes the decorators of the class's `forward` off as well.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    own = vars(model)
    own.pop("_is_accelerate_prepared", None)
    original = own.pop("_original_forward", None)
    if original is not None:
        del model.forward
        if model.forward != original:  # not the class's: the user's
            model.forward = original
    trainer.accelerator.free_memory()


class _ResumeNote(TrainerCallback):
    """Says from which checkpoint a phase goes on."""

    def __init__(self, job: Job, index: int):
        self.where = f"Phase {index + 1} of {len(job.phases)}, '{job.phases[index].name}'"

    def on_train_begin(self, args, state, control, **kwargs):
        """The steps that are done are those of the checkpoint; a phase that begins has none."""
        if state.global_step > 0:
            step = f"step {state.global_step} of {state.max_steps}"
            logger.warning(f"{self.where}, goes on from checkpoint-{state.global_step} ({step})")


class _PhaseClock(TrainerCallback):
    """Keeps `phase.json` at the state of the newest checkpoint, wall time summed over interruptions."""

    def __init__(self, folder: RunFolder, index: int, name: str):
        self.folder, self.index, self.name = folder, index, name
        self.before = float(folder.phase_state(index, name).get("seconds", 0.0))
        self.started = time.monotonic()

    def seconds(self) -> float:
        """Wall time of the phase so far."""
        return self.before + time.monotonic() - self.started

    def on_save(self, args, state, control, **kwargs):
        """Write the state beside the checkpoint that has just appeared."""
        if state.is_world_process_zero:
            values = {"status": "running", "step": state.global_step, "seconds": round(self.seconds(), 1)}
            self.folder.write_phase_state(self.index, self.name, values)
