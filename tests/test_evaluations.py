import math

import pytest

from ulmfit_tools.errors import InputError
from ulmfit_tools.evaluations import (
    Cycles,
    best_step,
    check_metric,
    cycle_evaluations,
    evaluations,
    falls_short,
    has_overfit,
    is_last_of_cycle,
)


def losses(*values, every=10):
    """A log as Trainer writes it, training logs in between."""
    history = []
    for number, value in enumerate(values, start=1):
        history += [{"loss": 1.0, "step": number * every - 5}, {"eval_loss": value, "step": number * every}]
    return [*history, {"train_loss": 0.5, "step": len(values) * every}]


def test_evaluations_are_read_from_the_log():
    assert evaluations(losses(3, 2), "loss") == evaluations(losses(3, 2), "eval_loss") == [(10, 3), (20, 2)]


def test_best_step_is_the_earliest_of_equals():
    assert best_step(losses(3, 1, 2, 1)) == 20
    assert best_step(losses(3, 1, 2, 1), greater_is_better=True) == 10
    assert best_step(losses(math.nan, 5, math.nan)) == 20
    assert best_step([{"loss": 1.0, "step": 1}]) is None


@pytest.mark.parametrize(
    ("values", "settings", "overfit"),
    [
        ([], {}, False),
        ([3], {}, False),
        ([3, 2], {}, False),
        ([3, 2, 2.5], {}, True),
        ([3, 2, 2.5], {"patience": 2}, False),
        ([3, 2, 2.5, 2.2], {"patience": 2}, True),
        ([3, 2, 2.5, 1.9, 2.2], {"patience": 2}, False),
        ([3, 2, 1.95], {"min_delta": 0.1}, True),
        ([3, 2, 1.95, 1.85], {"min_delta": 0.1, "patience": 2}, False),  # 1.85 is 0.15 below the best that counted
        ([3, 2, 2.5, 1], {}, True),  # what comes after the turn does not undo it
        ([1, 2], {"greater_is_better": True}, False),
        ([1, 2, 2], {"greater_is_better": True}, True),
    ],
)
def test_has_overfit(values, settings, overfit):
    assert has_overfit(losses(*values), **settings) is overfit


def epochs(*values, per_epoch=1):
    """An evaluation `per_epoch` times each epoch, an epoch of ten steps."""
    at = [number / per_epoch for number in range(1, len(values) + 1)]
    return [{"eval_loss": v, "epoch": e, "step": round(10 * e)} for v, e in zip(values, at, strict=True)]


@pytest.mark.parametrize(
    ("history", "cycles", "ends"),
    [
        # cycles of 1, 2 and 4 epochs end after epochs 1, 3 and 7
        (epochs(9, 8, 7, 6, 5, 4, 3, 2), {"length": 1, "mult": 2}, [(10, 9), (30, 7), (70, 3)]),
        (epochs(9, 8, 7, 6, 5), {"length": 2}, [(20, 8), (40, 6)]),
        (epochs(9, 8, 7, 6, 5, per_epoch=3), {"length": 1}, [(10, 7)]),
        # the cycle ends at 1.5, between two evaluations: its last one counts once the next is there
        (epochs(9, 8), {"length": 1.5}, [(10, 9)]),
        (epochs(9), {"length": 1.5}, []),
        # cycles that are shorter than the way from one evaluation to the next
        (epochs(9, 8), {"length": 0.25}, [(10, 9), (20, 8)]),
        (epochs(9, 8, 7), {"length": 10, "mult": 2, "unit": "step"}, [(10, 9), (30, 7)]),
        ([], {"length": 1}, []),
    ],
)
def test_the_last_evaluation_of_each_cycle(history, cycles, ends):
    assert cycle_evaluations(history, "loss", Cycles(**cycles)) == ends


@pytest.mark.parametrize(
    ("at", "interval", "last"),
    # cycles end after 1, 3 and 7
    [(1, 1, True), (2, 1, False), (3, 1, True), (0.5, 0.5, False), (0.6, 0.5, True), (3.2, 4, True)],
)
def test_the_last_evaluation_of_a_cycle_is_known_when_it_takes_place(at, interval, last):
    assert is_last_of_cycle(at, interval, Cycles(length=1, mult=2)) is last


@pytest.mark.parametrize(
    ("share", "best", "rows", "short"),
    [
        (0.46, 0.5, 200, False),  # the standard error of a difference is sqrt(2 / 4 / 200) = 0.05
        (0.44, 0.5, 200, True),
        (0.875, 0.9, 200, False),  # it is sqrt(0.18 / 200) = 0.03
        (0.865, 0.9, 200, True),
        (0.9, 0.9, 200, False),
        (0.99, 1.0, 200, True),  # where all are right there is no chance
        (89.0, 90.0, 200, True),  # nor is any known for percents
    ],
)
def test_accuracies_that_only_chance_tells_apart(share, best, rows, short):
    assert falls_short(share, best, rows) is short


def test_a_loss_that_rises_within_a_cycle_is_no_overfitting():
    # after the restarts of epochs 1 and 3 it is up; at the ends of the cycles, 1, 3 and 7, it is 5, 4, 3, then 3.5
    history = epochs(5, 6, 4, 7, 6, 5, 3, *[4] * 7, 3.5)
    cycles = Cycles(length=1, mult=2)
    assert has_overfit(history[:6])
    assert not has_overfit(history[:-1], cycles=cycles)
    assert has_overfit(history, cycles=cycles)
    assert not has_overfit(history, cycles=cycles, patience=2)


def test_a_metric_that_is_not_there_is_refused_once_there_are_evaluations():
    check_metric([{"loss": 1.0, "step": 1}], "eval_acuracy")
    history = [{"eval_loss": 1.0, "eval_accuracy": 0.5, "step": 1}]
    check_metric(history, "accuracy")
    with pytest.raises(
        InputError, match=r'"eval_acuracy"; there are eval_accuracy, eval_loss. Did you mean "eval_accu'
    ):
        check_metric(history, "eval_acuracy")
