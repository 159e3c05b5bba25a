"""Running a plan: its phases in order, each in its own folder, recorded so that the same call goes on anywhere."""

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging

from ulmfit_tools.callbacks import StopWhenOverfit
from ulmfit_tools.checkpoints import (
    NoGoodCheckpoint,
    clean_up,
    delete_folder,
    list_checkpoints,
    whole_folder,
    write_json,
)
from ulmfit_tools.data import (
    TextClassificationData,
    ensure_padding,
    load_model_and_tokenizer,
    load_text_classification,
    tokenize,
)
from ulmfit_tools.errors import InputError
from ulmfit_tools.freezing import set_trainable, trainable_names
from ulmfit_tools.layers import LayerGroups, layer_groups
from ulmfit_tools.lr_range import find_learning_rate
from ulmfit_tools.metrics import classification_metrics
from ulmfit_tools.plans.phase import Phase
from ulmfit_tools.plans.plan import FineTuningPlan
from ulmfit_tools.plans.record import RunFolder, check_folder, describe_run, start_folder
from ulmfit_tools.plans.results import PhaseResult, PlanResult, clean_metrics
from ulmfit_tools.plans.settings import phase_arguments, run_arguments
from ulmfit_tools.trainer import (
    ULMFiTTrainer,
    ULMFiTTrainingArguments,
    check_optimizer,
    optimizer_of_arguments,
)

logger = logging.get_logger(__name__)


@dataclass
class _Job:
    """What every phase of a run needs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    splits: Any
    folder: RunFolder
    phases: list[Phase]
    phase_args: list[ULMFiTTrainingArguments]
    compute_metrics: Callable
    callbacks: Sequence[TrainerCallback]


def run_plan(
    plan: str | Path | FineTuningPlan,
    *,
    model: str | PreTrainedModel,
    data: str | TextClassificationData,
    output_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    compute_metrics: Callable = classification_metrics,
    callbacks: Sequence[TrainerCallback] = (),
    **training_arguments: Any,
) -> PlanResult:
    """Run a plan from its first phase to the evaluated model, or go on with a run that was stopped.

    Each phase is one `ULMFiTTrainer` run with only its layer groups trainable, prepared anew by Accelerate: frozen
    layers are not in its optimizer, and distributed training needs no search for unused parameters. Phase `i`
    (from 0) is seeded with `seed + i`, so nothing carries over between phases but the weights.

    Args:
        plan: Name of a shipped plan, path of a YAML file, or a plan.
        model: `minilm`, a Hub name or folder, or a model object (then give its `tokenizer`).
        data: A dataset name, file or folder as `load_text_classification` takes it, or its result.
        output_dir: The run folder.
        tokenizer: Only beside a model object.
        max_length: Texts are cut to this many tokens; by default to what the model takes.
        resume: Go on with the run in `output_dir`, or start it where there is none. A complete run is not run
            again: its recorded result comes back.
        overwrite: Start anew in a folder that holds a run; the old run's record and phases are deleted.
        trust_remote_code: Allow a Hub model to run its own code.
        compute_metrics: As `Trainer` takes it.
        callbacks: More callbacks, for every phase.
        **training_arguments: Any field of `ULMFiTTrainingArguments`. They win over the plan's settings; what a phase
            names itself stays.

    Returns:
        The result, which is also in `results.json`.

    Raises:
        InputError: Bad input, a folder that holds another run, or a resume whose plan, settings, data or model differ.
    """
    plan = plan if isinstance(plan, FineTuningPlan) else FineTuningPlan.load(plan)
    args = run_arguments(plan, output_dir, training_arguments)
    folder = RunFolder(Path(output_dir))
    if isinstance(data, str):
        data = load_text_classification(data, seed=args.seed)
    classifier, tokenizer, model_name = _get_model(model, tokenizer, data, args, trust_remote_code)
    groups = layer_groups(classifier)
    phases = plan.expand(groups.names)
    phase_args = [
        phase_arguments(phase, args, folder.phase_folder(i, phase.name), i, validates="validation" in data.splits)
        for i, phase in enumerate(phases)
    ]
    for phase, its_args in zip(phases, phase_args, strict=True):
        _check_phase(phase, its_args, classifier, groups, data)
    description = describe_run(
        plan.to_dict(),
        args.to_dict() | {"max_length": max_length},
        {
            "source": data.source,
            "fingerprint": data.fingerprint,
            "rows": {name: len(split) for name, split in data.splits.items()},
            "text_columns": list(data.text_columns),
            "label_names": list(data.label_names),
        },
        {"name": model_name, "fingerprint": _fingerprint(classifier), "groups": list(groups.names)},
        args.world_size,
    )
    state = PartialState()
    check_folder(folder, description, resume=resume, overwrite=overwrite)
    state.wait_for_everyone()  # every process has looked before the first one writes
    finished = None if overwrite else folder.read("results.json")
    if finished is not None:
        logger.warning(f"The run in {folder.path} is complete: nothing to do.")
        return PlanResult.from_dict(folder.path, finished)
    if state.is_main_process:
        start_folder(folder, description, overwrite=overwrite)
    state.wait_for_everyone()
    with state.main_process_first():  # the others read what it left in the cache
        splits = tokenize(data, tokenizer, max_length=max_length, config=classifier.config)
    job = _Job(classifier, tokenizer, splits, folder, phases, phase_args, compute_metrics, callbacks)
    return _run_phases(job, plan.name)


def _get_model(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: TextClassificationData,
    args: ULMFiTTrainingArguments,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """The model, its tokenizer and its name; the head of a named model is drawn from the run's seed."""
    set_seed(args.seed)
    if isinstance(model, str):
        loaded, tokenizer = load_model_and_tokenizer(
            model, label_names=data.label_names, trust_remote_code=trust_remote_code
        )
        ensure_padding(tokenizer, loaded)
        return loaded, tokenizer, model
    if tokenizer is None:
        raise InputError(
            "A model object needs its tokenizer beside it: run_plan(..., model=model, tokenizer=tokenizer)"
        )
    if model.config.num_labels != len(data.label_names):
        raise InputError(
            f"The model has {model.config.num_labels} labels and the data {len(data.label_names)} "
            f"({', '.join(data.label_names[:10])}): load the model with num_labels={len(data.label_names)}"
        )
    ensure_padding(tokenizer, model)
    return model, tokenizer, type(model).__name__


def _check_phase(phase: Phase, args: ULMFiTTrainingArguments, model: Any, groups: LayerGroups, data: Any) -> None:
    """Whatever is wrong with a phase is told before the first one starts."""
    if phase.keep == "best" and "validation" not in data.splits:
        raise InputError(f"Phase '{phase.name}' chooses by the validation loss, and the data has no validation split")
    if not trainable_names(model, groups, phase.groups_to_train(groups.names)):
        raise InputError(
            f"Phase '{phase.name}' would train nothing: train={phase.train!r} has no parameter that can train"
        )
    check_optimizer(args, len(groups))


def _fingerprint(model: PreTrainedModel) -> str:
    """sha256 over names and bytes of all weights: the start of the run, to the bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _run_phases(job: _Job, plan_name: str) -> PlanResult:
    results: list[PhaseResult] = []
    weights: Path | None = None  # where the weights lie that the next phase starts from; None: they are in the model
    trainer = None
    for index, phase in enumerate(job.phases):
        state = job.folder.phase_state(index, phase.name)
        here = job.folder.phase_folder(index, phase.name)
        if state["status"] == "done":
            weights = here / "model"
            results.append(_result(phase, state["result"]))
            continue
        if trainer is not None:
            _release(trainer)
        trainer = _phase_trainer(job, index)
        if weights is not None:
            trainer.load_weights(weights)
        logger.warning(f"Phase {index + 1} of {len(job.phases)}, '{phase.name}', trains {_trains(job, phase)[1]}")
        results.append(_run_phase(job, index, trainer))
        weights = None
    if trainer is None:  # every phase was done, and the run was stopped before its last lines
        trainer = _phase_trainer(job, len(job.phases) - 1)
        trainer.load_weights(here / "model")
    return _finish(job, plan_name, trainer, results)


def _result(phase: Phase, values: Mapping[str, Any]) -> PhaseResult:
    return PhaseResult(**{**values, "name": phase.name, "trains": tuple(values["trains"])})


def _trains(job: _Job, phase: Phase) -> tuple[tuple[str, ...], str]:
    names = layer_groups(job.model).names
    trained = tuple(names[i] for i in phase.groups_to_train(names))
    if len(trained) == len(names):
        return trained, f"all {len(names)} layer groups"
    if len(trained) < 4:
        return trained, ", ".join(trained)
    return trained, f"{trained[0]} to {trained[-1]} ({len(trained)} groups)"


def _phase_trainer(job: _Job, index: int) -> ULMFiTTrainer:
    """A trainer for one phase: its groups trainable, its rates and length in the arguments."""
    phase, args = job.phases[index], job.phase_args[index]
    groups = layer_groups(job.model)
    set_trainable(job.model, groups, phase.groups_to_train(groups.names))
    callbacks = [*job.callbacks, _PhaseClock(job.folder, index, phase.name)]
    if phase.until_overfit is not None:
        until = phase.until_overfit
        callbacks.append(StopWhenOverfit(patience=until.patience, min_delta=until.min_delta))
    return ULMFiTTrainer(
        model=job.model,
        args=args,
        train_dataset=job.splits["train"],
        eval_dataset=job.splits.get("validation"),
        processing_class=job.tokenizer,
        data_collator=DataCollatorWithPadding(job.tokenizer, pad_to_multiple_of=8 if args.fp16 or args.bf16 else None),
        compute_metrics=job.compute_metrics,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=optimizer_of_arguments(args, trainable_only=True),
    )


def _run_phase(job: _Job, index: int, trainer: ULMFiTTrainer) -> PhaseResult:
    phase = job.phases[index]
    here = job.folder.phase_folder(index, phase.name)
    if phase.learning_rate == "auto":
        find_learning_rate(trainer, here / "lr_range.json")  # kept there: a resumed phase reads it
        trainer.optimizer_cls_and_kwargs = optimizer_of_arguments(trainer.args, trainable_only=True)
    if trainer.is_world_process_zero():
        clean_up(here)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.train(resume_from_checkpoint=bool(list_checkpoints(here)))
    except NoGoodCheckpoint as none_left:
        logger.warning(f"Phase '{phase.name}' starts anew from the weights of the phase before. {none_left}")
        trainer.train()
    clock = next(c for c in trainer.callback_handler.callbacks if isinstance(c, _PhaseClock))
    result = PhaseResult(
        name=phase.name,
        trains=_trains(job, phase)[0],
        learning_rate=_rate(trainer.args),
        epochs=round(trainer.state.epoch or 0.0, 4),
        steps=trainer.state.global_step,
        seconds=round(clock.seconds(), 1),
        metrics=_kept_metrics(trainer),
    )
    if trainer.args.should_save:
        with whole_folder(here / "model") as staging:
            trainer.save_model(str(staging))
        trainer.save_state()
        values = dataclasses.asdict(result)
        job.folder.write_phase_state(
            index, phase.name, {"status": "done", "seconds": result.seconds, "result": values}
        )
        _tidy(job, index)
    trainer.accelerator.wait_for_everyone()
    return result


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


def _tidy(job: _Job, index: int) -> None:
    """Remove what this phase's result makes needless: its checkpoints, and the weights that it started from."""
    done = job.folder.phase_folder(index, job.phases[index].name)
    for checkpoint in list_checkpoints(done):
        delete_folder(checkpoint)
    if index > 0:
        before = job.folder.phase_folder(index - 1, job.phases[index - 1].name)
        if (before / "model").is_dir():
            delete_folder(before / "model")


def _release(trainer: ULMFiTTrainer) -> None:
    """Undo what Accelerate wrapped around the model, so that the next phase is prepared from the bare one."""
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()


def _finish(job: _Job, plan_name: str, trainer: ULMFiTTrainer, results: list[PhaseResult]) -> PlanResult:
    metrics = {}
    if results[-1].metrics:
        metrics["validation"] = results[-1].metrics
    if "test" in job.splits:
        scores = trainer.evaluate(job.splits["test"], metric_key_prefix="test")
        metrics["test"] = clean_metrics(scores, "test_")
    seconds = round(sum(result.seconds for result in results), 1)
    result = PlanResult(job.folder.path, plan_name, results, metrics, seconds)
    if trainer.args.should_save:
        trainer.save_model(str(job.folder.path))
        write_json(job.folder.path / "results.json", result.to_dict())
        last = len(job.phases) - 1
        shutil.rmtree(job.folder.phase_folder(last, job.phases[last].name) / "model", ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return result


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
