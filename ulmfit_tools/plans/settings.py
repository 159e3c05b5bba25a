"""Whose word counts: flags, then the plan's settings, then defaults; and what a phase makes of them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ulmfit_tools.errors import InputError, nearest
from ulmfit_tools.plans.phase import Phase
from ulmfit_tools.plans.plan import FineTuningPlan
from ulmfit_tools.schedules import SCHEDULES
from ulmfit_tools.training_args import ULMFiTTrainingArguments, check_values

# What every run does unless told otherwise: a look at the validation split and a checkpoint after each epoch. A phase
# is prepared with just its own parameters trainable, so DDP need not search for unused ones in each step.
_RUN_DEFAULTS = {"eval_strategy": "epoch", "save_strategy": "epoch", "ddp_find_unused_parameters": False}

# Training arguments that a run of phases decides itself, and what to use in their place.
_MANAGED = {
    "max_steps": "a phase's 'steps' says how long it trains",
    "load_best_model_at_end": "a phase's 'keep: best' does this",
    "greater_is_better": "of the loss the lowest is the best, of every other metric the highest",
    "resume_from_checkpoint": "--resume goes on from the last good checkpoint",
    "save_only_model": "a checkpoint without optimizer could not be resumed",
    "do_train": "train trains and evaluates",
    "do_eval": "train trains and evaluates",
    "do_predict": "the predict command predicts",
    "remove_unused_columns": "the columns are those that the model reads",
    "ignore_data_skip": "a resumed run would see other data",
    "push_to_hub": "the run folder is an ordinary model folder: when it is done, hf upload NAME RUN_DIR",
    "auto_find_batch_size": "a run whose batch size changes cannot be resumed to the bit",
}

# By what `keep: best` may go where the metrics are this package's; the loss unless told otherwise.
_BEST_BY = ("loss", "accuracy", "f1_macro", "f1_weighted", "mcc")

# What says how the rates of the layer groups differ; no two of them go together.
_RATES_OF_GROUPS = {"learning_rate_low", "group_learning_rates", "discriminative_factor"}

# Arguments that serve only the phases that name none of their own: argument -> the phase's keys that replace it.
_PHASE_KEYS = {
    "learning_rate": ("learning_rate",),
    "learning_rate_low": ("learning_rate", "factor"),
    "group_learning_rates": ("learning_rate", "factor"),
    "num_train_epochs": ("epochs", "steps", "until_overfit"),
    "lr_scheduler_type": ("schedule",),
    "lr_scheduler_kwargs": ("schedule",),
    "discriminative_factor": ("factor",),
    "num_layer_groups": ("num_groups",),
}


def run_arguments(
    plan: FineTuningPlan,
    output_dir: str | Path,
    given: Mapping[str, Any],
    *,
    own_metrics: bool = False,
    own_loss: bool = False,
) -> ULMFiTTrainingArguments:
    """The training arguments of a run: what was given, then the plan's settings, then defaults.

    Args:
        plan: The plan to run.
        output_dir: The run folder.
        given: The arguments that the user set (flags and config file, or keyword arguments).
        own_metrics: Whether the metrics are the user's own, so that their names are not known.
        own_loss: Whether the loss is the user's own, which Trainer does not smooth.

    Raises:
        InputError: An argument does not exist, is one that a plan manages, has a wrong value, or is one that every
            phase of the plan names itself, so that it would silently do nothing.
    """
    names = [field.name for field in dataclasses.fields(ULMFiTTrainingArguments) if field.init]
    for origin, values in ((f"Plan '{plan.name}', settings", plan.settings), ("Training arguments", given)):
        for key in values:
            if key in _MANAGED:
                raise InputError(f"{origin}: {key} has no place in a run of phases: {_MANAGED[key]}")
            if key not in names or key == "output_dir":
                raise InputError(f"{origin}: there is no training argument {key!r}.{nearest(key, names)}")
    values = {"output_dir": str(output_dir), **_values(plan, given)}
    for key in given:
        _check_used(plan, key, values)
    if own_loss and values.pop("label_smoothing_factor", 0) and "label_smoothing_factor" in given:
        raise InputError("label_smoothing_factor would do nothing beside compute_loss_func: smooth the labels there")
    _check_metric(values.get("metric_for_best_model") or "loss", own_metrics)
    # Some phases may warm up while others, with the run's schedule, have a rise of their own: see `phase_arguments`.
    warmup = values.pop("warmup_steps", 0) if any(_warms_up(phase, values) for phase in plan.phases) else None
    try:
        args = ULMFiTTrainingArguments(**values)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise InputError(" ".join(str(error).split())) from None
    if warmup is not None:
        args.warmup_steps = warmup
    check_values(args)
    args.dataloader_pin_memory &= args.device.type != "cpu"  # torch warns of it in every epoch
    return args


def run_notes(plan: FineTuningPlan, given: Mapping[str, Any], *, own_loss: bool = False) -> list[str]:
    """What to say aloud of arguments that `run_arguments` takes: where they do nothing.

    Args:
        plan: As for `run_arguments`.
        given: As for `run_arguments`.
        own_loss: As for `run_arguments`.

    Returns:
        One line each.
    """
    values = _values(plan, given)
    notes = []
    for key in given:
        without = _without(plan, key, values)
        if without:
            served = ", ".join(f"'{phase.name}'" for phase in plan.phases if phase.name not in without)
            others = "; ".join(f"'{name}' {reason}" for name, reason in without.items())
            notes.append(f"--{key} serves {served} of the plan's phases. {others}.")
    found = [f"'{phase.name}'" for phase in plan.phases if phase.learning_rate == "auto"]
    if "learning_rate" in given and found:
        notes.append(f"--learning_rate serves {', '.join(found)} only where a range test finds no rate too high.")
    if own_loss and values.get("label_smoothing_factor", 0):
        notes.append(f"label_smoothing_factor of plan '{plan.name}' is left out: compute_loss_func is the loss.")
    return notes


def _check_metric(best_by: Any, own_metrics: bool) -> None:
    name = str(best_by).removeprefix("eval_")
    if name not in _BEST_BY and not (own_metrics and isinstance(best_by, str)):
        raise InputError(
            f"metric_for_best_model is one of {', '.join(_BEST_BY)}.{nearest(name, _BEST_BY)} Received: "
            f"metric_for_best_model={best_by!r}"
        )


def _values(plan: FineTuningPlan, given: Mapping[str, Any]) -> dict[str, Any]:
    return {**_RUN_DEFAULTS, **_settings_beside(plan, given), **given}


def _settings_beside(plan: FineTuningPlan, given: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's settings, without those that belong to what the user replaced."""
    replaced: set[str] = set()
    if not _RATES_OF_GROUPS.isdisjoint(given):  # one of them replaces the plan's, whichever that is
        replaced |= _RATES_OF_GROUPS
    if "lr_scheduler_type" in given:
        replaced.add("lr_scheduler_kwargs")
        if not any(_warms_up(phase, given) for phase in plan.phases):
            replaced.add("warmup_steps")
    return {key: value for key, value in plan.settings.items() if key not in replaced}


def _warms_up(phase: Phase, values: Mapping[str, Any]) -> bool:
    """Whether a phase's schedule takes `warmup_steps`: this package's schedules have a rise of their own."""
    return _schedule(phase, values) not in SCHEDULES


def _schedule(phase: Phase, values: Mapping[str, Any]) -> str:
    return phase.schedule or str(values.get("lr_scheduler_type", ULMFiTTrainingArguments.lr_scheduler_type))


def _check_used(plan: FineTuningPlan, key: str, values: Mapping[str, Any]) -> None:
    """Refuse an argument that does nothing for any phase."""
    without = _without(plan, key, values)
    if len(without) == len(plan.phases):
        why = " or ".join(dict.fromkeys(without.values()))
        raise InputError(
            f"--{key} would do nothing: every phase of plan '{plan.name}' {why}; change the plan's file, or leave the "
            "flag out"
        )
    if key == "metric_for_best_model" and all(phase.keep != "best" for phase in plan.phases):
        raise InputError(
            f"--{key} would do nothing: no phase of plan '{plan.name}' keeps its best weights; give one 'keep: best', "
            "or leave the flag out"
        )


def _without(plan: FineTuningPlan, key: str, values: Mapping[str, Any]) -> dict[str, str]:
    """The phases for which an argument does nothing, each with the reason."""
    reasons = {phase.name: _unused(phase, key, values) for phase in plan.phases}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _unused(phase: Phase, key: str, values: Mapping[str, Any]) -> str | None:
    """Why an argument does nothing for a phase; None where it serves the phase."""
    if key == "learning_rate" and phase.learning_rate == "auto":
        return None  # what it takes where its range test finds no rate that is too high
    named = [own for own in _PHASE_KEYS.get(key, ()) if getattr(phase, own) is not None]
    if key == "discriminative_factor" and isinstance(phase.learning_rate, tuple):
        named.append("learning_rate")  # a span says how the rates differ
    elif key in ("learning_rate_low", "group_learning_rates") and isinstance(phase.learning_rate, str):
        named.remove("learning_rate")  # a rate that is found leaves the ratios between groups as they are
    if named:
        return f"names its own {' and '.join(named)}"
    if key == "warmup_steps" and not _warms_up(phase, values):
        return f"has the schedule {_schedule(phase, values)}, which rises by itself"
    if phase.keep == "best" and _saves_otherwise(key, values):
        return "keeps its best weights, and so writes its checkpoints when it evaluates (--eval_strategy)"
    return None


def _saves_otherwise(key: str, values: Mapping[str, Any]) -> bool:
    """Whether an argument asks for checkpoints at other steps than those of the evaluations."""
    if key == "save_strategy":
        return bool(values["save_strategy"] != values["eval_strategy"])
    if key == "save_steps" and values["eval_strategy"] == "steps":
        return values["save_steps"] != values.get("eval_steps", values["save_steps"])
    return False


def phase_arguments(
    phase: Phase, args: ULMFiTTrainingArguments, folder: Path, index: int, *, validates: bool
) -> ULMFiTTrainingArguments:
    """The training arguments of one phase: the run's, with what the phase names itself in their place.

    Args:
        phase: The phase.
        args: The run's arguments.
        folder: Where the phase's checkpoints go.
        index: The phase's 0-based place; its seed is the run's plus this, so no two phases see one data order.
        validates: Whether there is a validation split to evaluate on.

    Raises:
        InputError: The phase and the arguments do not go together.
    """
    changes: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": args.seed + index,
        "data_seed": None if args.data_seed is None else args.data_seed + index,
    }
    if phase.epochs is not None:
        changes["num_train_epochs"] = phase.epochs
    if phase.steps is not None:
        changes["max_steps"] = phase.steps
    if phase.until_overfit is not None:
        changes["num_train_epochs"] = phase.until_overfit.max_epochs
    if isinstance(phase.learning_rate, tuple):
        low, high = phase.learning_rate
        changes |= {"learning_rate_low": low, "group_learning_rates": None, "learning_rate": high}
    elif phase.learning_rate is not None and not isinstance(phase.learning_rate, str):
        changes |= {"learning_rate_low": None, "group_learning_rates": None, "learning_rate": phase.learning_rate}
    if isinstance(phase.learning_rate, tuple) or phase.factor is not None:
        changes["discriminative_factor"] = phase.factor
    if phase.factor is not None:
        changes |= {"learning_rate_low": None, "group_learning_rates": None}
    if phase.num_groups is not None:
        changes["num_layer_groups"] = phase.num_groups
    if phase.schedule is not None:
        changes |= {"lr_scheduler_type": phase.schedule, "lr_scheduler_kwargs": dict(phase.schedule_settings)}
    if (phase.schedule or args.schedule_name) in SCHEDULES:
        changes["warmup_steps"] = 0  # these have a rise of their own
    if not validates:
        changes["eval_strategy"] = "no"
    elif phase.keep == "best":
        # The best checkpoint can only be kept where one is written at each evaluation.
        changes |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": args.metric_for_best_model or "loss",
            "greater_is_better": bool(args.greater_is_better),  # derived from the metric
            "save_strategy": args.eval_strategy,
            "save_steps": args.eval_steps or args.save_steps,
        }
    try:
        return dataclasses.replace(args, **changes)
    except (ValueError, TypeError) as error:
        raise InputError(f"Phase '{phase.name}': {' '.join(str(error).split())}") from None
