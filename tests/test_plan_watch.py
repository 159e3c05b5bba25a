"""A phase that cannot come to anything ends the run in one line, as soon as it is seen."""

import json

import numpy as np
import pytest
import torch
from tiny_plans import run, weights
from tiny_text import colour_texts, model_folder, write_csv
from transformers import TrainerCallback

from ulmfit_tools import FineTuningPlan, InputError, Phase, load_text_classification
from ulmfit_tools.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(model_folder(tmp_path_factory.mktemp("model")))


def plan_of(*phases, **settings):
    return FineTuningPlan(name="x", phases=phases, settings={"per_device_train_batch_size": 16} | settings)


class Poison(TrainerCallback):
    """Makes the weights worthless after a step, as an overflow does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.classifier.weight.data.fill_(torch.nan)


@pytest.mark.parametrize(
    ("keep", "settings", "how"),
    [
        ("best", {}, "the validation loss is nan at step 6"),  # six steps are an epoch
        ("last", {}, "the validation loss is nan at step 6"),
        ("last", {"logging_steps": 1}, "the gradients are nan at step 2"),
        ("best", {"logging_steps": 1}, "the gradients are nan at step 2"),
        ("last", {"eval_strategy": "no"}, "the validation loss is nan at step 12"),
    ],
)
def test_a_phase_that_has_diverged_ends_the_run(keep, settings, how, model, data, tmp_path):
    plan = plan_of(Phase(name="a", epochs=2, learning_rate=1e-3, keep=keep), Phase(name="b", steps=1))
    more = {"callbacks": [Poison(1)], **settings}
    for resume in (False, True):  # it is not recorded as done, so a resume comes to the same end
        with pytest.raises(InputError, match=f"Phase 'a' has diverged: {how}.*Received: learning_rate=0.001") as error:
            run(plan, model, data, tmp_path / "run", resume=resume, **more)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run/results.json").exists()
    assert not list(tmp_path.glob("run/phases/02*"))


def test_without_validation_the_weights_are_looked_at(model, tmp_path):
    data = load_text_classification(str(write_csv(tmp_path / "rows.csv", colour_texts(48))), validation_split=0)
    plan = plan_of(Phase(name="a", steps=2))
    with pytest.raises(InputError, match="Phase 'a' has diverged: the loss is no number at step 2"):
        run(plan, model, data, tmp_path / "run", callbacks=[Poison(1)])
    assert run(plan, model, data, tmp_path / "good").phases[0].steps == 2


def test_weights_from_before_it_diverged_are_kept(model, data, tmp_path):
    plan = plan_of(Phase(name="a", epochs=3, learning_rate=1e-2, keep="best"), logging_steps=1)
    result = run(plan, model, data, tmp_path / "run", callbacks=[Poison(8)])
    assert np.isfinite(result.phases[0].metrics["loss"])
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_divergence_on_the_command_line_is_one_line_and_exit_code_2(model, data, tmp_path, capsys):
    flags = ["--model", model, "--dataset", data, "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    flags += ["--plan", "baseline", "--learning_rate", "1e30", "--disable_tqdm", "true"]
    assert main(["train", *flags]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("ulmfit-tools: Phase 'all' has diverged")


def f1_only(prediction):
    return {"f1": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def test_a_metric_that_own_metrics_lack_is_told_at_the_first_evaluation_of_the_run(model, data, tmp_path):
    plan = plan_of(
        Phase(name="a", train="head", epochs=2),
        Phase(name="b", epochs=1, keep="best"),
        metric_for_best_model="accuracy",
    )
    with pytest.raises(InputError, match="lack 'accuracy'.*there are loss, f1. Set metric_for_best_model"):
        run(plan, model, data, tmp_path / "run", compute_metrics=f1_only)
    assert [path.name for path in (tmp_path / "run/phases").iterdir()] == ["01-a"]
    assert not list(tmp_path.glob("run/phases/01-a/checkpoint-*"))  # an epoch was trained, not two


def test_the_best_weights_are_chosen_by_a_metric_of_the_users_own(model, data, tmp_path):
    plan = plan_of(Phase(name="a", epochs=6, learning_rate=0.3, keep="best"), lr_scheduler_type="constant")
    more = {"compute_metrics": f1_only, "metric_for_best_model": "f1"}
    result = run(plan, model, data, tmp_path / "run", **more)
    log = json.loads((tmp_path / "run/phases/01-a/trainer_state.json").read_text())["log_history"]
    found = [(entry["eval_f1"], entry["eval_loss"]) for entry in log if "eval_f1" in entry]
    best = max(found, key=lambda scores: scores[0])  # the first of them
    assert (result.phases[0].metrics["f1"], result.phases[0].metrics["loss"]) == best
    assert best[1] > min(loss for _, loss in found)  # by the loss it would be another
