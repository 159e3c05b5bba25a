"""Running a plan: its phases in order, each in its own folder, recorded so that the same call goes on anywhere."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging

from ulmfit_tools.checkpoints import write_json
from ulmfit_tools.data import (
    TextClassificationData,
    ensure_padding,
    load_model_and_tokenizer,
    load_text_classification,
    tokenize,
)
from ulmfit_tools.errors import InputError
from ulmfit_tools.freezing import trainable_names
from ulmfit_tools.layers import LayerGroups, layer_groups
from ulmfit_tools.lr_range import check_rows
from ulmfit_tools.metrics import classification_metrics
from ulmfit_tools.plans.handover import go_on_after, handed_on, phases_to_keep, tidy_complete
from ulmfit_tools.plans.identity import describe_data, describe_model
from ulmfit_tools.plans.phase import Phase
from ulmfit_tools.plans.phase_run import Job, phase_trainer, release, run_phase, trains
from ulmfit_tools.plans.plan import FineTuningPlan
from ulmfit_tools.plans.record import RunFolder, check_folder, check_same_run, describe_run, start_folder
from ulmfit_tools.plans.results import PhaseResult, PlanResult, clean_metrics
from ulmfit_tools.plans.settings import phase_arguments, run_arguments, run_notes
from ulmfit_tools.trainer import (
    ULMFiTTrainer,
    ULMFiTTrainingArguments,
    check_optimizer,
    try_arguments,
)

logger = logging.get_logger(__name__)


def run_plan(
    plan: str | Path | FineTuningPlan,
    *,
    model: str | Path | PreTrainedModel,
    data: str | Path | TextClassificationData,
    output_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    compute_metrics: Callable = classification_metrics,
    compute_loss_func: Callable | None = None,
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
        compute_metrics: As `Trainer` takes it. `metric_for_best_model` is then one of the names that it returns; where
            it is not, the run ends at its first evaluation.
        compute_loss_func: A loss of your own, such as one with class weights, as `Trainer` takes it:
            `loss(outputs, labels, num_items_in_batch=None)`. Where `num_items_in_batch` is given, in training, it is
            the number of rows of the whole update: return the sum over the batch divided by it, and the mean where it
            is not. It replaces label smoothing. Its name is recorded: a run is resumed with the same only.
        callbacks: More callbacks, for every phase.
        **training_arguments: Any field of `ULMFiTTrainingArguments`. They win over the plan's settings; what a phase
            names itself stays.

    Returns:
        The result, which is also in `results.json`.

    Raises:
        InputError: Bad input, a folder that holds another run, or a resume whose plan, settings, data or model differ;
            or a phase has diverged.
    """
    plan = plan if isinstance(plan, FineTuningPlan) else FineTuningPlan.load(plan)
    own = {"own_metrics": compute_metrics is not classification_metrics, "own_loss": compute_loss_func is not None}
    args = check_run(plan, output_dir, training_arguments, resume=resume, overwrite=overwrite, **own)
    for note in run_notes(plan, training_arguments, own_loss=own["own_loss"]):
        logger.warning(note)
    folder = RunFolder(Path(output_dir))
    if isinstance(data, (str, Path)):
        data = load_text_classification(str(data), seed=args.seed)
    classifier, tokenizer, model_name = _get_model(model, tokenizer, data, args, trust_remote_code)
    groups = layer_groups(classifier)
    phases = plan.expand(groups.names)
    phase_args = [
        phase_arguments(phase, args, folder.phase_folder(i, phase.name), i, validates="validation" in data.splits)
        for i, phase in enumerate(phases)
    ]
    for phase, its_args in zip(phases, phase_args, strict=True):
        _check_phase(phase, its_args, classifier, groups, data)
        if phase.augment is not None:
            phase.augment.check_tokenizer(tokenizer, pairs=len(data.text_columns) > 1)
    settings = args.to_dict() | {"max_length": max_length, "compute_loss_func": _name(compute_loss_func)}
    described = {"name": model_name, **describe_model(classifier, tokenizer, groups)}
    description = describe_run(plan.to_dict(), settings, describe_data(data), described, args.world_size)
    state = PartialState()
    check_folder(folder, resume=resume, overwrite=overwrite)  # again: another run may have begun in it since
    if resume:
        check_same_run(folder, description)
    finished = None if overwrite else folder.read("results.json", "plan", "phases", "metrics", "seconds")
    kept = 0 if overwrite or finished else phases_to_keep(folder, phases)
    state.wait_for_everyone()  # every process has looked before the first one writes
    if finished is not None:
        if state.is_main_process:
            tidy_complete(folder, phases)
        logger.warning(f"The run in {folder.path} is complete: nothing to do.")
        return PlanResult.from_dict(folder.path, finished)
    try_arguments(classifier, phase_args[0])
    if state.is_main_process:
        start_folder(folder, description, overwrite=overwrite)
        go_on_after(folder, phases, kept)
    state.wait_for_everyone()
    with state.main_process_first():  # the others read what it left in the cache
        splits = tokenize(data, tokenizer, max_length=max_length, config=classifier.config)
    job = Job(classifier, tokenizer, splits, folder, phases, phase_args, compute_metrics, callbacks, compute_loss_func)
    trainable = [(parameter, parameter.requires_grad) for parameter in classifier.parameters()]
    try:
        return _run_phases(job, plan.name)
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def check_run(
    plan: FineTuningPlan,
    output_dir: str | Path,
    given: Mapping[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    **own: bool,
) -> ULMFiTTrainingArguments:
    """The training arguments of a run, and whatever can be refused before its data are read; nothing is written.

    Args:
        plan: The plan to run.
        output_dir: The run folder.
        given: The arguments that the user set.
        resume: As for `run_plan`.
        overwrite: As for `run_plan`.
        **own: `own_metrics` and `own_loss`, as for `run_arguments`.

    Raises:
        InputError: An argument is wrong or would do nothing, or the folder cannot be this run's.
    """
    args = run_arguments(plan, output_dir, given, **own)
    check_folder(RunFolder(Path(output_dir)), resume=resume, overwrite=overwrite)
    return args


def _name(function: Callable | None) -> str | None:
    return None if function is None else getattr(function, "__qualname__", type(function).__name__)


def _get_model(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: TextClassificationData,
    args: ULMFiTTrainingArguments,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """The model, its tokenizer and its name; the head of a named model is drawn from the run's seed."""
    set_seed(args.seed)
    if isinstance(model, (str, Path)):
        loaded, tokenizer = load_model_and_tokenizer(
            str(model), label_names=data.label_names, trust_remote_code=trust_remote_code
        )
        ensure_padding(tokenizer, loaded)
        return loaded, tokenizer, str(model)
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
    if phase.keep == "best" and args.eval_strategy == "no":
        raise InputError(
            f"Phase '{phase.name}' keeps its best weights, which evaluations find: evaluate by epoch or steps. "
            "Received: eval_strategy=no"
        )
    if not trainable_names(model, groups, phase.groups_to_train(groups.names)):
        raise InputError(
            f"Phase '{phase.name}' would train nothing: train={phase.train!r} has no parameter that can train"
        )
    check_optimizer(args, len(groups))
    if phase.learning_rate == "auto":
        check_rows(len(data.splits["train"]), args)


def _run_phases(job: Job, plan_name: str) -> PlanResult:
    results: list[PhaseResult] = []
    weights: Path | None = None  # where the weights lie that the next phase starts from; None: they are in the model
    trainer = None
    for index, phase in enumerate(job.phases):
        state = job.folder.phase_state(index, phase.name)
        if state["status"] == "done":
            weights = handed_on(job.folder, job.phases, index)
            results.append(_result(phase, state["result"]))
            continue
        if trainer is not None:
            release(trainer)
        trainer = phase_trainer(job, index)
        if weights is not None:
            trainer.load_weights(weights)
        logger.warning(f"Phase {index + 1} of {len(job.phases)}, '{phase.name}', trains {trains(job, phase)[1]}")
        if phase.note:
            logger.warning(phase.note)
        results.append(run_phase(job, index, trainer, results[-1] if results else None))
        weights = None
    if trainer is None:  # every phase was done, and the run was stopped before its last lines
        trainer = phase_trainer(job, len(job.phases) - 1)
        trainer.load_weights(handed_on(job.folder, job.phases, len(job.phases) - 1))
    return _finish(job, plan_name, trainer, results)


def _result(phase: Phase, values: Mapping[str, Any]) -> PhaseResult:
    return PhaseResult(**{**values, "name": phase.name, "trains": tuple(values["trains"])})


def _finish(job: Job, plan_name: str, trainer: ULMFiTTrainer, results: list[PhaseResult]) -> PlanResult:
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
        tidy_complete(job.folder, job.phases)
    trainer.accelerator.wait_for_everyone()
    release(trainer)
    return result
