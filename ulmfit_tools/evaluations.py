"""What the evaluations of a run say, read from `TrainerState.log_history`: the best one, and whether it has overfit.

Pure functions of the history that every checkpoint carries, so what they decide survives a resume.
"""

import math
from collections.abc import Iterable
from typing import Any

from ulmfit_tools.errors import InputError, nearest

History = Iterable[dict[str, Any]]


def evaluations(history: History, metric: str) -> list[tuple[int, float]]:
    """The `(step, value)` of a metric at each evaluation, in order.

    Args:
        history: `TrainerState.log_history`.
        metric: The name of the metric, with or without Trainer's `eval_`.
    """
    key = _logged_name(metric)
    return [(entry["step"], entry[key]) for entry in history if key in entry]


def is_better(value: float, best: float, greater_is_better: bool, min_delta: float = 0.0) -> bool:
    """Whether a value improves on the best so far by more than `min_delta`; `nan` is worse than any number."""
    if math.isnan(best):
        return not math.isnan(value)
    return value - best > min_delta if greater_is_better else best - value > min_delta


def best_step(history: History, *, metric: str = "eval_loss", greater_is_better: bool = False) -> int | None:
    """The step of the best evaluation, the earliest of equal ones; None before the first.

    The same evaluation as `TrainerState.best_global_step` where `metric_for_best_model` is this metric.
    """
    best, step = math.nan, None
    for at, value in evaluations(history, metric):
        if is_better(value, best, greater_is_better):
            best, step = value, at
    return step


def has_overfit(
    history: History,
    *,
    patience: int = 1,
    min_delta: float = 0.0,
    metric: str = "eval_loss",
    greater_is_better: bool = False,
) -> bool:
    """Whether the validation loss has turned up: `patience` evaluations in a row did not improve on the best one.

    Once it has, it has: evaluations that a run adds after that change nothing.

    Args:
        history: `TrainerState.log_history`.
        patience: How many evaluations in a row without an improvement make the turn.
        min_delta: A smaller change than this is no improvement, in units of the metric.
        metric: The name of the metric, with or without Trainer's `eval_`.
        greater_is_better: Whether the metric improves upwards.
    """
    best, waited = math.nan, 0
    for _, value in evaluations(history, metric):
        if is_better(value, best, greater_is_better, min_delta):
            best, waited = value, 0
        else:
            waited += 1
        if waited >= patience:
            return True
    return False


def check_metric(history: History, metric: str) -> None:
    """Refuse a metric that the evaluations do not have.

    Raises:
        InputError: There are evaluations, and none has the metric.
    """
    known = {key for entry in history for key in entry if key.startswith("eval_")}
    if known and _logged_name(metric) not in known:
        names = ", ".join(sorted(known))
        raise InputError(f'No evaluation has the metric "{metric}"; there are {names}.{nearest(metric, known)}')


def _logged_name(metric: str) -> str:
    return metric if metric.startswith("eval_") else f"eval_{metric}"
