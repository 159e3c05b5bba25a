"""What the evaluations of a run say, read from `TrainerState.log_history`: the best one, and whether it has overfit.

Pure functions of the history that every checkpoint carries, so what they decide survives a resume.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ulmfit_tools.errors import InputError, nearest

History = Iterable[dict[str, Any]]
_ROUNDING = 1e-6  # epochs in the history are sums of fractions


@dataclass(frozen=True, kw_only=True)
class Cycles:
    """The cycles of a schedule with warm restarts (`schedules.get_sgdr_schedule`), one after another.

    Args:
        length: Length of the first cycle.
        mult: How many times longer each next one is.
        unit: What both count: "epoch" or "step", as in `TrainerState.log_history`.
    """

    length: float = 1
    mult: float = 1
    unit: str = "epoch"


def evaluations(history: History, metric: str) -> list[tuple[int, float]]:
    """The `(step, value)` of a metric at each evaluation, in order.

    Args:
        history: `TrainerState.log_history`.
        metric: The name of the metric, with or without Trainer's `eval_`.
    """
    key = _logged_name(metric)
    return [(entry["step"], entry[key]) for entry in history if key in entry]


def cycle_evaluations(history: History, metric: str, cycles: Cycles) -> list[tuple[int, float]]:
    """The `(step, value)` of the last evaluation in each cycle that has come to its end.

    A cycle has ended once there is an evaluation at its end or after it; one without any evaluation is passed over.

    Args:
        history: `TrainerState.log_history`.
        metric: The name of the metric, with or without Trainer's `eval_`.
        cycles: The cycles.
    """
    key = _logged_name(metric)
    last: dict[int, tuple[int, float]] = {}
    at_end = True
    for entry in history:
        if key in entry:
            number, at_end = _cycle(entry[cycles.unit], cycles)
            last[number] = entry["step"], entry[key]
    return list(last.values()) if at_end else list(last.values())[:-1]


def is_last_of_cycle(at: float, interval: float, cycles: Cycles) -> bool:
    """Whether no other evaluation comes before the end of the cycle.

    Args:
        at: Where in the run the evaluation takes place, in the unit of the cycles.
        interval: How far it is to the next evaluation, in the same unit.
        cycles: The cycles.
    """
    return _cycle(at, cycles)[0] != _cycle(at + interval, cycles)[0]


def _cycle(at: float, cycles: Cycles) -> tuple[int, bool]:
    """The number of the cycle, from 0, that a point in the run belongs to, and whether it is that cycle's end."""
    number, length, end = 0, cycles.length, cycles.length
    while at > end + _ROUNDING:
        number, length = number + 1, length * cycles.mult
        end += length
    return number, at >= end - _ROUNDING


def is_better(value: float, best: float, greater_is_better: bool, min_delta: float = 0.0) -> bool:
    """Whether a value improves on the best so far by more than `min_delta`; `nan` is worse than any number."""
    if math.isnan(best):
        return not math.isnan(value)
    return value - best > min_delta if greater_is_better else best - value > min_delta


def falls_short(share: float, best: float, rows: int) -> bool:
    """Whether an accuracy is below the best one by more than chance makes of it.

    Two shares of so many rows that only chance tells apart differ with a standard error of `sqrt(2 p (1 - p) / rows)`,
    where `p` is the better one.
    """
    return best - share > math.sqrt(max(2 * best * (1 - best) / rows, 0.0))  # of percents nobody knows the error


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
    cycles: Cycles | None = None,
) -> bool:
    """Whether the validation loss has turned up: `patience` evaluations in a row did not improve on the best one.

    Once it has, it has: evaluations that a run adds after that change nothing.

    Args:
        history: `TrainerState.log_history`.
        patience: How many evaluations in a row without an improvement make the turn.
        min_delta: A smaller change than this is no improvement, in units of the metric.
        metric: The name of the metric, with or without Trainer's `eval_`.
        greater_is_better: Whether the metric improves upwards.
        cycles: Count only the evaluation at the end of each of these cycles: a warm restart raises the loss for a
            while, and that is no overfitting.
    """
    best, waited = math.nan, 0
    counted = evaluations(history, metric) if cycles is None else cycle_evaluations(history, metric, cycles)
    for _, value in counted:
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
