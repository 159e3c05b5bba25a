import math

import pytest

from ulmfit_tools.errors import InputError
from ulmfit_tools.evaluations import best_step, check_metric, evaluations, has_overfit


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


def test_a_metric_that_is_not_there_is_refused_once_there_are_evaluations():
    check_metric([{"loss": 1.0, "step": 1}], "eval_acuracy")
    history = [{"eval_loss": 1.0, "eval_accuracy": 0.5, "step": 1}]
    check_metric(history, "accuracy")
    with pytest.raises(
        InputError, match=r'"eval_acuracy"; there are eval_accuracy, eval_loss. Did you mean "eval_accu'
    ):
        check_metric(history, "eval_acuracy")
