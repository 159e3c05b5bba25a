"""A run with a loss of the user's own: it trains, also accumulated and from activations, and is recorded."""

import functools
import json

import pytest
import torch
from tiny_plans import Stop, StopAt, run, same, weights
from tiny_text import model_folder
from torch.nn.functional import cross_entropy

from ulmfit_tools import FineTuningPlan, InputError, Phase
from ulmfit_tools.plans.settings import run_arguments, run_notes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(model_folder(tmp_path_factory.mktemp("model"), hidden_dropout_prob=0.0))


PLAN = FineTuningPlan(
    name="x",
    settings={"learning_rate": 1e-2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    phases=[Phase(name="head", train="head", epochs=1, precompute=True), Phase(name="all", epochs=2)],
)


def weighted(outputs, labels, num_items_in_batch=None, class_weights=(1.0, 1.0, 1.0)):
    losses = cross_entropy(outputs["logits"], labels, reduction="none") * torch.tensor(class_weights)[labels]
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch


def test_even_weights_are_the_loss_of_the_model_accumulated_and_precomputed_too(model, data, tmp_path):
    own = run(PLAN, model, data, tmp_path / "own", compute_loss_func=weighted)
    usual = run(PLAN, model, data, tmp_path / "usual")
    assert own.phases[0].precomputed is not None
    for ours, theirs in zip(own.phases, usual.phases, strict=True):
        assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-4)
    assert own.metrics["test"] == pytest.approx(usual.metrics["test"], rel=1e-4)


def test_a_class_of_weight_0_is_not_learnt(model, data, tmp_path):
    only_the_first = functools.partial(weighted, class_weights=(1.0, 0.0, 0.0))
    result = run(PLAN, model, data, tmp_path / "run", compute_loss_func=only_the_first)
    assert result.metrics["test"]["accuracy"] == pytest.approx(1 / 3)
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"]["compute_loss_func"] == "partial"


def test_a_run_is_resumed_with_its_own_loss_only(model, data, tmp_path):
    run(PLAN, model, data, tmp_path / "whole", compute_loss_func=weighted)
    with pytest.raises(Stop):
        run(PLAN, model, data, tmp_path / "run", compute_loss_func=weighted, callbacks=[StopAt("02-all", 8)])
    with pytest.raises(InputError, match='settings.compute_loss_func: "weighted" -> null'):
        run(PLAN, model, data, tmp_path / "run", resume=True)
    run(PLAN, model, data, tmp_path / "run", resume=True, compute_loss_func=weighted)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_label_smoothing_is_left_out_aloud_or_refused(tmp_path):
    plan = FineTuningPlan.load("gradual_unfreezing")
    assert run_arguments(plan, tmp_path, {}, own_loss=True).label_smoothing_factor == 0
    (note,) = run_notes(plan, {}, own_loss=True)
    assert note.startswith("label_smoothing_factor of plan 'gradual_unfreezing' is left out")
    assert run_notes(plan, {}) == []
    with pytest.raises(InputError, match="label_smoothing_factor would do nothing beside compute_loss_func"):
        run_arguments(plan, tmp_path, {"label_smoothing_factor": 0.1}, own_loss=True)
