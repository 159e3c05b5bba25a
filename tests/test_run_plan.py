"""Plans run on a tiny model: order, records, resume, refusals, and the folder as an ordinary model folder."""

import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_bert
from tiny_plans import TWO_PHASES, Stop, StopAt, run, same, weights
from tiny_text import COLOURS, colour_folder, colour_texts, model_folder, tiny_tokenizer, write_csv
from transformers import TrainerCallback, pipeline

from ulmfit_tools import FineTuningPlan, InputError, LRCurve, Phase, UntilOverfit, load_text_classification
from ulmfit_tools.data.augmentation import Augmentation
from ulmfit_tools.layers import layer_groups
from ulmfit_tools.plans.settings import run_arguments


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(model_folder(tmp_path_factory.mktemp("model"), hidden_dropout_prob=0.1))


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """The uninterrupted run that resumed ones are compared with."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return run(TWO_PHASES, model, data, folder)


def test_result_tells_phases_and_metrics(whole):
    head, everything = whole.phases
    assert (head.name, head.trains, head.steps, head.epochs) == ("head", ("head",), 6, 1.0)  # 96 rows / 16
    assert (everything.name, everything.steps, everything.epochs) == ("all", 12, 2.0)
    assert len(everything.trains) == 6  # embeddings, four layers, head
    assert set(whole.metrics) == {"validation", "test"}
    assert set(whole.metrics["test"]) == {"loss", "accuracy", "f1_macro", "f1_weighted", "mcc"}
    assert whole.metrics["validation"] == everything.metrics


def test_only_the_phase_groups_move(model, data, tmp_path):
    plan = FineTuningPlan(name="x", phases=[Phase(name="one", train=["layer.1"], steps=2, learning_rate=1e-2)])
    start = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            start.update({name: value.clone() for name, value in model.state_dict().items()})
            start["optimised"] = sum(len(group["params"]) for group in optimizer.param_groups)

    run(plan, model, data, tmp_path / "run", callbacks=[Look()], eval_strategy="no")
    moved = {name for name, value in weights(tmp_path / "run").items() if not torch.equal(value, start[name])}
    assert moved
    assert all("layer.1." in name for name in moved)
    assert start["optimised"] == 16  # 6 linear layers and 2 norms, each with weight and bias: no frozen parameter


def test_folder_is_an_ordinary_model_folder_with_label_names(whole):
    classify = pipeline("text-classification", model=str(whole.output_dir), device="cpu")
    assert classify("the red sky")[0]["label"] in COLOURS
    assert classify.model.config.id2label == dict(enumerate(sorted(COLOURS)))


def test_record_tells_plan_settings_versions_data_and_phases(whole):
    record = json.loads((whole.output_dir / "run.json").read_text())
    assert FineTuningPlan.from_dict(record["plan"]) == TWO_PHASES
    assert record["settings"]["learning_rate"] == 1e-2
    assert record["settings"]["seed"] == 3
    assert record["data"]["rows"] == {"train": 96, "validation": 24, "test": 24}
    assert record["data"]["label_names"] == sorted(COLOURS)
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]["torch"]
    state = json.loads((whole.output_dir / "phases/02-all/phase.json").read_text())
    assert state["status"] == "done"
    assert state["result"]["metrics"] == whole.phases[1].metrics
    logged = json.loads((whole.output_dir / "phases/02-all/trainer_state.json").read_text())["log_history"]
    assert sum("eval_loss" in entry for entry in logged) == 2
    left = sorted(path.name for path in (whole.output_dir / "phases/02-all").iterdir())
    assert left == ["phase.json", "trainer_state.json"]  # no checkpoint stays behind


def test_complete_run_is_not_run_again(whole, model, data):
    before = {path: path.stat().st_mtime_ns for path in whole.output_dir.rglob("*") if path.is_file()}
    assert run(TWO_PHASES, model, data, whole.output_dir, resume=True) == whole
    assert before == {path: path.stat().st_mtime_ns for path in whole.output_dir.rglob("*") if path.is_file()}


def test_second_run_in_a_folder_is_refused_and_nothing_is_lost(whole, model, data):
    before = weights(whole.output_dir)
    with pytest.raises(InputError, match=r"holds a run already \(plan 'two'\).*--resume"):
        run(TWO_PHASES, model, data, whole.output_dir)
    assert same(before, weights(whole.output_dir))


def test_folder_with_other_files_is_refused(model, data, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        run(TWO_PHASES, model, data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_killed_in_the_writing_of_its_first_file_begins_again(model, data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".incomplete-run.json").write_text('{"pla')
    plan = FineTuningPlan(name="short", phases=[Phase(name="only", steps=1)])
    assert run(plan, model, data, folder, resume=True).plan == "short"
    assert not (folder / ".incomplete-run.json").exists()


def test_overwrite_starts_anew(whole, model, data, tmp_path):
    shutil.copytree(whole.output_dir, tmp_path / "run")
    plan = FineTuningPlan(name="short", phases=[Phase(name="a", train="head", steps=1)])
    assert run(plan, model, data, tmp_path / "run", overwrite=True).plan == "short"
    assert [path.name for path in (tmp_path / "run/phases").iterdir()] == ["01-a"]


def test_overwrite_starts_anew_where_the_record_was_moved_away(whole, model, data, tmp_path):
    """As the message for a damaged `run.json` says: of the old run, with another seed, nothing is gone on with."""
    with pytest.raises(Stop):
        run(TWO_PHASES, model, data, tmp_path / "run", callbacks=[StopAt("02-all", 9)], seed=5)
    (tmp_path / "run/run.json").unlink()
    (tmp_path / "run/phases/mine.txt").write_text("what no run made")
    run(TWO_PHASES, model, data, tmp_path / "run", overwrite=True)
    assert same(weights(tmp_path / "run"), weights(whole.output_dir))
    assert (tmp_path / "run/phases/mine.txt").exists()


@pytest.mark.parametrize(
    ("phase", "step", "event"),
    [
        ("01-head", 1, "on_step_end"),  # the first step of all: nothing has been saved
        ("01-head", 4, "on_step_end"),
        ("01-head", 6, "on_evaluate"),  # after the validation, before the checkpoint
        ("01-head", 6, "on_save"),
        ("01-head", 6, "on_train_end"),  # the phase's last moment
        ("02-all", 0, "on_train_begin"),  # the boundary between phases
        ("02-all", 1, "on_step_end"),
        ("02-all", 6, "on_save"),
        ("02-all", 9, "on_step_end"),  # in mid-epoch, past a checkpoint
        ("02-all", 12, "on_train_end"),
    ],
)
@pytest.mark.parametrize("saving", [{}, {"save_strategy": "steps", "save_steps": 2}], ids=["by epoch", "by step"])
def test_resumed_run_ends_with_the_same_bits(whole, model, data, tmp_path, phase, step, event, saving):
    with pytest.raises(Stop):
        run(TWO_PHASES, model, data, tmp_path / "run", callbacks=[StopAt(phase, step, event)], **saving)
    assert not (tmp_path / "run/results.json").exists()
    result = run(TWO_PHASES, model, data, tmp_path / "run", resume=True, **saving)
    assert same(weights(tmp_path / "run"), weights(whole.output_dir))
    assert result.metrics == whole.metrics
    assert [p.metrics for p in result.phases] == [p.metrics for p in whole.phases]


def test_moved_run_folder_resumes_and_says_where(whole, model, data, tmp_path, caplog):
    with pytest.raises(Stop):
        run(TWO_PHASES, model, data, tmp_path / "run", callbacks=[StopAt("02-all", 9)])
    (tmp_path / "run").rename(tmp_path / "moved")
    assert "goes on from" not in caplog.text
    run(TWO_PHASES, model, data, tmp_path / "moved", resume=True)
    assert caplog.text.count("Phase 2 of 2, 'all', goes on from checkpoint-6 (step 6 of 12)") == 1
    assert same(weights(tmp_path / "moved"), weights(whole.output_dir))


@pytest.fixture(scope="module")
def stopped(model, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Stop):
        run(TWO_PHASES, model, data, folder, callbacks=[StopAt("02-all", 9)])
    return folder


def changed_plan():
    phases = [TWO_PHASES.phases[0], Phase(name="all", epochs=3)]
    return FineTuningPlan(name="two", settings=TWO_PHASES.settings, phases=phases)


def test_resume_with_a_changed_plan_is_refused(stopped, model, data):
    with pytest.raises(InputError, match=r"plan.phases\[1\].epochs: 2 -> 3"):
        run(changed_plan(), model, data, stopped, resume=True)


def test_resume_with_changed_settings_is_refused(stopped, model, data):
    with pytest.raises(InputError, match=r"settings.learning_rate: 0.01 -> 0.02"):
        run(TWO_PHASES, model, data, stopped, resume=True, learning_rate=2e-2)


def test_resume_with_another_model_is_refused(stopped, data, tmp_path):
    other = str(model_folder(tmp_path / "other", seed=9, hidden_dropout_prob=0.1))
    with pytest.raises(InputError, match="model.fingerprint"):
        run(TWO_PHASES, other, data, stopped, resume=True)


def test_resume_with_other_data_is_refused(stopped, model, tmp_path):
    other = colour_folder(tmp_path / "data")
    write_csv(other / "train.csv", colour_texts(96, seed=5))
    with pytest.raises(InputError, match="data.fingerprint"):
        run(TWO_PHASES, model, str(other), stopped, resume=True)


def test_keep_best_hands_on_the_weights_of_the_lowest_validation_loss(model, data, tmp_path):
    # So high a rate makes things worse in most epochs.
    phase = Phase(name="a", epochs=5, learning_rate=0.3, schedule="constant", keep="best")
    result = run(FineTuningPlan(name="x", phases=[phase]), model, data, tmp_path / "run")
    log = json.loads((tmp_path / "run/phases/01-a/trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert result.phases[0].metrics["loss"] == min(losses)
    assert min(losses) < losses[-1]
    check = run(FineTuningPlan(name="y", phases=[Phase(name="z", steps=1, learning_rate=1e-30)]),
                str(tmp_path / "run"), data, tmp_path / "again")  # fmt: skip
    assert check.phases[0].metrics["loss"] == pytest.approx(min(losses), rel=1e-5)


def test_keep_best_goes_by_another_metric_where_the_plan_names_one(model, data, tmp_path):
    phase = Phase(name="a", epochs=6, learning_rate=0.3, keep="best")
    plan = FineTuningPlan(name="x", settings={"metric_for_best_model": "accuracy"}, phases=[phase])
    result = run(plan, model, data, tmp_path / "run", lr_scheduler_type="constant")
    log = json.loads((tmp_path / "run/phases/01-a/trainer_state.json").read_text())["log_history"]
    evaluations = [entry for entry in log if "eval_loss" in entry]
    best = max(evaluations, key=lambda entry: entry["eval_accuracy"])  # the first of them
    assert best["eval_loss"] > min(entry["eval_loss"] for entry in evaluations)  # by the loss it would be another
    assert result.phases[0].metrics["accuracy"] == best["eval_accuracy"]
    assert result.phases[0].metrics["loss"] == best["eval_loss"]


def test_until_overfit_stops_and_resumes_with_the_same_bits(model, data, tmp_path):
    until = UntilOverfit(patience=1, max_epochs=8)
    plan = FineTuningPlan(name="x", phases=[Phase(name="a", until_overfit=until, learning_rate=0.3)])
    first = run(plan, model, data, tmp_path / "first")
    assert first.phases[0].epochs < 8
    steps = first.phases[0].steps
    for event in ("on_save", "on_train_end"):
        folder = tmp_path / event
        with pytest.raises(Stop):
            run(plan, model, data, folder, callbacks=[StopAt("01-a", steps, event)])
        again = run(plan, model, data, folder, resume=True)
        assert again.phases[0].steps == steps  # not one step more
        assert same(weights(folder), weights(tmp_path / "first"))


class Scripted(TrainerCallback):
    """Puts another value of a validation metric into the log before anyone reads it there."""

    def __init__(self, name, *values):
        self.name, self.values = name, iter(values)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.name in logs:
            logs[self.name] = state.log_history[-1][self.name] = next(self.values)


SGDR = {"schedule": "sgdr", "schedule_settings": {"cycle_len": 1, "cycle_mult": 2}}  # ends after epochs 1, 3, 7, 15


def test_under_sgdr_overfitting_and_the_best_are_told_at_the_ends_of_cycles(model, data, tmp_path):
    losses = Scripted("eval_loss", 5.0, 3.0, 4.0, 7.0, 2.0, 5.0, 4.5)
    plan = FineTuningPlan(
        name="x", phases=[Phase(name="a", until_overfit=UntilOverfit(patience=1, max_epochs=15), **SGDR)]
    )
    phase = run(plan, model, data, tmp_path / "run", callbacks=[losses]).phases[0]
    assert phase.epochs == 7
    assert phase.metrics["loss"] == 4.0  # of the cycle ends 5, 4 and 4.5; between them 2 was lower


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        # evaluated after every 4 of an epoch's 6 steps: the last ones in the cycles of 6, 12 and 24 steps are at 4, 16
        # and 40; at 20, 24, 28 ... 36 the third cycle goes on
        ({"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}, 5.0),
        ({}, 6.0),  # epochs 1, 3; 6 is the end of the training, in the middle of a cycle
    ],
)
def test_the_best_under_sgdr_is_the_last_evaluation_of_a_cycle_or_of_the_training(
    settings, kept, model, data, tmp_path
):
    losses = Scripted("eval_loss", 8.0, 4.0, 7.0, 5.0, 3.0, 6.0, 2.0, 9.0, 9.0)
    plan = FineTuningPlan(name="x", phases=[Phase(name="a", epochs=6, keep="best", **SGDR)])
    more = settings | {"per_device_train_batch_size": 16, "callbacks": [losses]}
    assert run(plan, model, data, tmp_path / "run", **more).phases[0].metrics["loss"] == kept


@pytest.mark.parametrize(
    ("shares", "kept"),
    # the cycles end after epochs 1, 3 and 7; of 24 rows the standard error at 0.5 is sqrt(2 / 4 / 24) = 0.144
    [
        ((0.5, 1, 0.4, 1, 1, 1, 0.38), 7),
        ((0.5, 1, 0.4, 1, 1, 1, 0.35), 3),  # nearer to 0.4 than to chance's reach, but it is the best that counts
        ((0.3, 1, 0.5, 1, 1, 1, 0.3), 3),
        ((0.5, 1, 0.3, 1, 1, 1, 0.3), 1),
    ],
)
def test_of_cycles_that_only_chance_tells_apart_the_last_is_kept(shares, kept, model, data, tmp_path):
    plan = FineTuningPlan(
        name="x",
        settings={"metric_for_best_model": "accuracy"},
        phases=[Phase(name="a", epochs=7, keep="best", **SGDR)],
    )
    run(plan, model, data, tmp_path / "run", callbacks=[Scripted("eval_accuracy", *shares, 1.0)])
    state = json.loads((tmp_path / "run/phases/01-a/trainer_state.json").read_text())
    steps = {entry["epoch"]: entry["step"] for entry in state["log_history"] if "eval_loss" in entry}
    assert state["best_global_step"] == steps[kept]


def test_rates_of_a_phase_reach_the_optimizer(model, data, tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            seen.append({group["name"]: group["initial_lr"] for group in optimizer.param_groups})

    plan = FineTuningPlan(name="x", settings={"learning_rate": 8e-3, "discriminative_factor": 2}, phases=[
        Phase(name="settings", steps=1),
        Phase(name="own", train="top_half", steps=1, learning_rate=1e-3, factor=10),
        Phase(name="span", train=2, steps=1, learning_rate=(1e-5, 1.0)),
    ])  # fmt: skip
    run(plan, model, data, tmp_path / "run", callbacks=[Look()], eval_strategy="no")
    settings, own, span = seen
    expected = {"embeddings": 2.5e-4, "layer.0": 5e-4, "layer.1": 1e-3, "layer.2": 2e-3, "layer.3": 4e-3, "head": 8e-3}
    assert settings == pytest.approx(expected)
    assert own == pytest.approx({"layer.2": 1e-5, "layer.3": 1e-4, "head": 1e-3})
    assert span == pytest.approx({"layer.3": 0.1, "head": 1.0})  # 1e-5 to 1 over six groups: ten times a group


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lerning_rate": 1}, "no training argument 'lerning_rate'.*Did you mean \"learning_rate\""),
        ({"max_steps": 3}, "max_steps has no place.*'steps'"),
        ({"load_best_model_at_end": True}, "keep: best"),
        ({"greater_is_better": True}, "greater_is_better has no place.*of every other metric the highest"),
        ({"metric_for_best_model": "mcc"}, "would do nothing: no phase of plan 'two' keeps its best weights"),
        ({"num_train_epochs": 3}, "would do nothing: every phase of plan 'two' names its own epochs"),
        ({"lr_scheduler_type": "slanted"}, "slanted_triangular"),
    ],
)
def test_wrong_or_ignored_argument_is_refused_before_anything_is_written(model, data, tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        run(TWO_PHASES, model, data, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_unknown_metric_of_a_plan_is_refused(tmp_path):
    plan = FineTuningPlan(name="x", settings={"metric_for_best_model": "acuracy"}, phases=[Phase(name="a")])
    with pytest.raises(InputError, match="Did you mean \"accuracy\".*metric_for_best_model='acuracy'"):
        run_arguments(plan, tmp_path, {})


def test_given_wins_over_plan_and_plan_over_default(tmp_path):
    args = run_arguments(TWO_PHASES, tmp_path, {"learning_rate": 5e-5, "use_cpu": True})
    assert (args.learning_rate, args.per_device_train_batch_size) == (5e-5, 16)


def test_best_needs_a_validation_split(model, tmp_path):
    data = load_text_classification(str(write_csv(tmp_path / "rows.csv", colour_texts(90))))
    data.splits.pop("validation")
    plan = FineTuningPlan(name="x", phases=[Phase(name="a", keep="best")])
    with pytest.raises(InputError, match="no validation split"):
        run(plan, model, data, tmp_path / "run")


def test_model_object_with_other_label_count_is_refused(data, tmp_path):
    with pytest.raises(InputError, match="5 labels and the data 3"):
        run(TWO_PHASES, tiny_bert(num_labels=5), data, tmp_path / "run", tokenizer=tiny_tokenizer())


def test_model_object_runs(data, tmp_path):
    bert = tiny_bert(num_labels=3)
    plan = FineTuningPlan(name="x", phases=[Phase(name="a", train="head", steps=2, learning_rate=1e-3)])
    result = run(plan, bert, data, tmp_path / "run", tokenizer=tiny_tokenizer())
    assert result.phases[0].trains == (layer_groups(bert).names[-1],)


def test_auto_rate_is_found_once_recorded_and_used_again_on_resume(model, data, tmp_path):
    plan = FineTuningPlan(name="x", settings={"per_device_train_batch_size": 16}, phases=[
        Phase(name="head", train="head", epochs=1, learning_rate=1e-2),
        Phase(name="all", epochs=2, learning_rate="auto", factor=1),
    ])  # fmt: skip
    first = run(plan, model, data, tmp_path / "first")
    record = tmp_path / "first/phases/02-all/lr_range.json"
    assert first.phases[1].learning_rate == LRCurve.from_json(record.read_text()).suggestion
    with pytest.raises(Stop):
        run(plan, model, data, tmp_path / "run", callbacks=[StopAt("02-all", 9)])
    found = tmp_path / "run/phases/02-all/lr_range.json"
    assert LRCurve.from_json(found.read_text()).suggestion == first.phases[1].learning_rate
    written = found.stat().st_mtime_ns
    run(plan, model, data, tmp_path / "run", resume=True)
    assert found.stat().st_mtime_ns == written
    assert same(weights(tmp_path / "run"), weights(tmp_path / "first"))


def test_previous_is_the_rate_of_the_phase_before_also_when_that_was_found_or_is_done(model, data, tmp_path):
    plan = FineTuningPlan(name="x", settings={"per_device_train_batch_size": 16}, phases=[
        Phase(name="found", train="head", epochs=1, learning_rate="auto"),
        Phase(name="taken", train="head", epochs=1, learning_rate="previous", note="At the same rate."),
        Phase(name="span", epochs=1, learning_rate=(1e-5, 1e-3)),
        Phase(name="high", epochs=1, learning_rate="previous"),
    ])  # fmt: skip
    with pytest.raises(Stop):
        run(plan, model, data, tmp_path / "run", callbacks=[StopAt("02-taken", 1)])
    found, taken, _, high = run(plan, model, data, tmp_path / "run", resume=True).phases
    assert taken.learning_rate == found.learning_rate != 5e-5  # 5e-5 is the default
    assert high.learning_rate == 1e-3  # a span's rate is that of its last group


def test_phase_whose_checkpoints_are_all_damaged_starts_anew(whole, model, data, tmp_path, caplog):
    with pytest.raises(Stop):
        run(TWO_PHASES, model, data, tmp_path / "run", callbacks=[StopAt("02-all", 9)])
    (checkpoint,) = (tmp_path / "run/phases/02-all").glob("checkpoint-*")
    (checkpoint / "optimizer.pt").write_bytes(b"")
    run(TWO_PHASES, model, data, tmp_path / "run", resume=True)
    assert "Phase 'all' starts anew" in caplog.text
    assert "optimizer.pt has 0 of" in caplog.text
    assert "goes on from" not in caplog.text
    names = [path.name for path in (tmp_path / "run/phases/02-all").iterdir()]
    assert sorted(names) == ["phase.json", "trainer_state.json"]  # the damaged ones were set aside, and are gone too
    assert same(weights(tmp_path / "run"), weights(whole.output_dir))


def test_a_phase_without_trainable_parameters_is_refused(data, tmp_path):
    from peft import LoraConfig, get_peft_model

    bert = get_peft_model(tiny_bert(num_labels=3), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    plan = FineTuningPlan(name="x", phases=[Phase(name="low", train=["embeddings"], steps=1)])
    with pytest.raises(InputError, match="'low' would train nothing"):
        run(plan, bert, data, tmp_path / "run", tokenizer=tiny_tokenizer())
    assert not (tmp_path / "run").exists()


def test_adapters_train_by_depth_and_resume(data, tmp_path):
    from peft import LoraConfig, get_peft_model

    def adapted():
        torch.manual_seed(0)
        return get_peft_model(tiny_bert(num_labels=3), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))

    plan = FineTuningPlan(name="x", settings={"learning_rate": 1e-2}, phases=[
        Phase(name="top", train=2, epochs=1), Phase(name="all", train=5, epochs=1),
    ])  # fmt: skip
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            seen.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})

    quiet = {"tokenizer": tiny_tokenizer(), "per_device_train_batch_size": 16}
    first = run(plan, adapted(), data, tmp_path / "first", callbacks=[Look()], **quiet)
    assert all("lora_" in name or "classifier" in name for names in seen for name in names)
    assert [sorted({int(name.split("layer.")[1][0]) for name in names if "layer." in name}) for names in seen] == [
        [3],
        [0, 1, 2, 3],
    ]
    with pytest.raises(Stop):
        run(plan, adapted(), data, tmp_path / "run", callbacks=[StopAt("02-all", 3)], **quiet)
    again = run(plan, adapted(), data, tmp_path / "run", resume=True, **quiet)
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "run")]
    assert same(*adapters)
    assert again.metrics == first.metrics


PRECOMPUTED = FineTuningPlan(
    name="precomputed",
    settings={"learning_rate": 1e-2, "per_device_train_batch_size": 16},
    phases=[
        Phase(name="head", train="head", epochs=2, precompute=True),
        Phase(name="top", train=3, epochs=1, precompute=True),
        Phase(name="all", epochs=1),
    ],
)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ULMFIT_TOOLS_CACHE", str(tmp_path / "cache"))


def test_a_precomputed_plan_gives_the_numbers_of_the_one_through_the_layers(data, tmp_path, caplog, own_cache):
    model = str(model_folder(tmp_path / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    through = dataclasses.replace(
        PRECOMPUTED, phases=[dataclasses.replace(phase, precompute=False) for phase in PRECOMPUTED.phases]
    )
    with caplog.at_level(logging.WARNING):
        result = run(PRECOMPUTED, model, data, tmp_path / "from")
    expected = run(through, model, data, tmp_path / "through")
    for ours, theirs in zip(result.phases, expected.phases, strict=True):
        assert ours.metrics["loss"] == pytest.approx(theirs.metrics["loss"], rel=1e-5)
    head, top, everything = result.phases
    assert (head.precomputed["form"], head.precomputed["reused"]) == ("vector", False)
    # The first pass kept what the second phase needs: the layers below it do not move in between.
    assert "The same pass keeps what leaves bert.encoder.layer.1" in caplog.text
    assert (top.precomputed["form"], top.precomputed["reused"]) == ("sequence", True)
    assert everything.precomputed is None
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        again = run(PRECOMPUTED, model, data, tmp_path / "again", learning_rate=1e-3)
    assert [phase.precomputed["reused"] for phase in again.phases[:2]] == [True, True]


@pytest.mark.parametrize(("phase", "step"), [("01-head", 3), ("01-head", 8), ("02-top", 2), ("03-all", 3)])
def test_a_precomputed_plan_resumes_to_the_same_bits(model, data, tmp_path, phase, step):
    run(PRECOMPUTED, model, data, tmp_path / "whole")
    with pytest.raises(Stop):
        run(PRECOMPUTED, model, data, tmp_path / "run", callbacks=[StopAt(phase, step)])
    run(PRECOMPUTED, model, data, tmp_path / "run", resume=True)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_later_phase_is_not_served_where_its_frozen_layers_move_before(model, data, tmp_path, caplog, own_cache):
    plan = FineTuningPlan(name="x", phases=[
        Phase(name="head", train="head", steps=1, precompute=True),
        Phase(name="moves", train=5, steps=1),
        Phase(name="top", train=3, steps=1, precompute=True),
    ])  # fmt: skip
    with caplog.at_level(logging.WARNING):
        result = run(plan, model, data, tmp_path / "run")
    assert "The same pass keeps" not in caplog.text
    assert not result.phases[2].precomputed["reused"]


def test_what_cannot_be_precomputed_is_said_and_trained_without(model, data, tmp_path, caplog):
    plan = FineTuningPlan(name="x", phases=[
        Phase(name="all", steps=1, precompute=True),
        Phase(name="head", train="head", steps=1, precompute=True, augment=Augmentation(drop=0.2)),
    ])  # fmt: skip
    with caplog.at_level(logging.WARNING):
        result = run(plan, model, data, tmp_path / "run")
    assert "Phase 'all' trains without precomputed activations. No block of layers is frozen" in caplog.text
    assert "Phase 'head' trains without precomputed activations. The text is augmented" in caplog.text
    assert [phase.precomputed for phase in result.phases] == [None, None]


def test_a_cache_folder_that_cannot_be_is_said_and_trained_without(model, data, tmp_path, caplog, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ULMFIT_TOOLS_CACHE", str(tmp_path / "file" / "cache"))
    plan = FineTuningPlan(name="x", phases=[Phase(name="head", train="head", steps=1, precompute=True)])
    with caplog.at_level(logging.WARNING):
        result = run(plan, model, data, tmp_path / "run")
    said = "Phase 'head' trains without precomputed activations. The activations could not be computed and kept in"
    assert said in caplog.text
    assert result.phases[0].precomputed is None


def eight_steps(model, data, folder, **more):
    return run("fastai_eight_steps", model, data, folder, per_device_train_batch_size=16, **more)


@pytest.fixture(scope="module")
def all_eight(model, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eight") / "whole"
    return eight_steps(model, data, folder)


def test_the_eight_steps(all_eight, caplog):
    precomputed, augmented, everything = all_eight.phases
    found = {path.parent.name: path.read_text() for path in all_eight.output_dir.rglob("lr_range.json")}
    rates = {name: LRCurve.from_json(text).suggestion for name, text in found.items()}
    assert sorted(rates) == ["01-head-precomputed", "03-all"]  # steps 2 and 7
    assert precomputed.precomputed["form"] == "vector"  # step 3
    assert augmented.precomputed is None  # step 4
    assert augmented.learning_rate == precomputed.learning_rate == rates["01-head-precomputed"]
    assert (precomputed.trains, augmented.trains) == (("head",), ("head",))
    assert len(everything.trains) == 6  # step 5
    assert everything.learning_rate == rates["03-all"]
    assert everything.epochs in (3, 7)  # step 8 ends with its second or third cycle
    plan = json.loads((all_eight.output_dir / "run.json").read_text())["plan"]
    assert [phase["note"].split(":")[0] for phase in plan["phases"]] == ["Steps 1 to 3", "Step 4", "Steps 5 to 8"]
    assert (plan["phases"][2]["num_groups"], plan["phases"][2]["factor"]) == (3, 3)  # step 6


@pytest.mark.parametrize(("phase", "step"), [("01-head-precomputed", 4), ("02-head-augmented", 9), ("03-all", 4)])
def test_the_eight_steps_resume_to_the_same_bits(all_eight, model, data, tmp_path, phase, step):
    with pytest.raises(Stop):
        eight_steps(model, data, tmp_path / "run", callbacks=[StopAt(phase, step)])
    eight_steps(model, data, tmp_path / "run", resume=True)
    assert same(weights(tmp_path / "run"), weights(all_eight.output_dir))


AUGMENTED = FineTuningPlan(
    name="augmented",
    settings=TWO_PHASES.settings,
    phases=[
        Phase(name="head", train="head", epochs=1, augment=Augmentation(drop=0.2)),
        Phase(name="all", epochs=2, augment=Augmentation(swap=0.2, span=0.1, mask=0.2)),
    ],
)


def test_augmented_phases_resume_in_mid_epoch_and_are_evaluated_on_the_texts_as_they_are(whole, model, data, tmp_path):
    first = run(AUGMENTED, model, data, tmp_path / "first")
    assert not same(weights(tmp_path / "first"), weights(whole.output_dir))
    saving = {"save_strategy": "steps", "save_steps": 2}
    for phase, step in (("01-head", 5), ("02-all", 9)):
        folder = tmp_path / phase
        with pytest.raises(Stop):
            run(AUGMENTED, model, data, folder, callbacks=[StopAt(phase, step)], **saving)
        assert run(AUGMENTED, model, data, folder, resume=True, **saving).metrics == first.metrics
        assert same(weights(folder), weights(tmp_path / "first"))
    idle = FineTuningPlan(name="y", phases=[Phase(name="z", steps=1, learning_rate=1e-30)])
    check = run(idle, str(tmp_path / "first"), data, tmp_path / "check")
    for split in ("validation", "test"):
        assert check.metrics[split]["loss"] == pytest.approx(first.metrics[split]["loss"], rel=1e-5)


def test_masking_without_a_mask_token_is_refused_before_anything_is_written(data, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    plan = FineTuningPlan(name="x", phases=[
        Phase(name="a", steps=1), Phase(name="b", steps=1, augment=Augmentation(mask=0.1))
    ])  # fmt: skip
    with pytest.raises(InputError, match="no mask token"):
        run(plan, tiny_bert(num_labels=3), data, tmp_path / "run", tokenizer=tokenizer)
    assert not (tmp_path / "run").exists()


def test_a_phase_says_its_rates_and_why_it_ended(model, data, tmp_path, caplog):
    """Three groups with a factor of 3 in between: the first has a ninth of the head's rate."""
    until = UntilOverfit(patience=1, max_epochs=1)
    plan = FineTuningPlan(name="x", phases=[
        Phase(name="x", learning_rate=9e-4, num_groups=3, factor=3, until_overfit=until)
    ])  # fmt: skip
    with caplog.at_level(logging.WARNING):
        steps = run(plan, model, data, tmp_path / "run").phases[0].steps
    assert re.search(r"Learning rate at its peak: 1\.0e-04 \(.*\) to 9\.0e-04 \(.*\), 3 of 3 groups", caplog.text)
    kept = f"the best weights are those of step {steps} of {steps}"
    assert f"Phase 'x' ends after 1 epochs, with max_epochs=1; {kept}" in caplog.text


def test_a_later_range_test_that_has_too_few_rows_is_refused_before_the_first_phase(model, data, tmp_path):
    plan = FineTuningPlan(name="x", phases=[Phase(name="a", steps=1), Phase(name="b", steps=1, learning_rate="auto")])
    with pytest.raises(InputError, match="smaller than one batch of 1000"):
        run(plan, model, data, tmp_path / "run", per_device_train_batch_size=1000)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps is at least 1. Received: 0"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers is at least 0. Received: -1"),
        ({"seed": -1}, "--seed is at least 0. Received: -1"),
        ({"adam_beta1": 2.0}, "Invalid beta parameter"),
        ({"report_to": "no_such"}, "no_such is not supported"),
        ({"fsdp": "full_shard"}, "fsdp only works in distributed training"),
        ({"deepspeed": "no_such.json"}, "deepspeed"),
        ({"push_to_hub": True}, "hf upload NAME RUN_DIR"),
        ({"resume": True, "overwrite": True}, "give one of them"),
    ],
)
def test_what_no_trainer_would_take_is_refused_before_anything_is_written(model, data, tmp_path, settings, words):
    with pytest.raises(InputError, match=words):
        run(TWO_PHASES, model, data, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


class NotesPrecision(TrainerCallback):
    """What the head puts out in training, phase by phase."""

    def __init__(self):
        self.seen = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        seen = self.seen.setdefault(Path(args.output_dir).name, set())
        self.hook = model.classifier.register_forward_hook(lambda head, inputs, output: seen.add(output.dtype))

    def on_train_end(self, args, state, control, **kwargs):
        self.hook.remove()


def test_every_phase_has_the_mixed_precision_that_was_asked_for(model, data, tmp_path):
    """Also one that is resumed, where the model has just been made: the same bits."""
    notes = NotesPrecision()
    run(TWO_PHASES, model, data, tmp_path / "whole", bf16=True, callbacks=[notes])
    assert notes.seen == {"01-head": {torch.bfloat16}, "02-all": {torch.bfloat16}}
    with pytest.raises(Stop):
        run(TWO_PHASES, model, data, tmp_path / "run", bf16=True, callbacks=[StopAt("02-all", 9)])
    run(TWO_PHASES, model, data, tmp_path / "run", bf16=True, resume=True)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_model_object_comes_back_bare_and_as_trainable_as_it_was(data, tmp_path):
    own = tiny_bert(num_labels=3)
    own.bert.embeddings.requires_grad_(False)
    plan = FineTuningPlan(name="x", phases=[Phase(name="head", train="head", steps=1)])
    run(plan, own, data, tmp_path / "run", tokenizer=tiny_tokenizer(), bf16=True)
    assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & vars(own).keys()
    assert {name for name, p in own.named_parameters() if not p.requires_grad} == {
        f"bert.embeddings.{name}" for name, _ in own.bert.embeddings.named_parameters()
    }


def test_paths_need_not_be_strings(whole, model, data, tmp_path):
    again = run(TWO_PHASES, Path(model), Path(data), tmp_path / "run")
    assert again.metrics == whole.metrics


def test_overwrite_takes_what_is_the_old_runs_alone(model, data, tmp_path):
    """Another run's adapter would be loaded on top of the new weights; what no run made is not ours."""
    folder, idle = tmp_path / "run", FineTuningPlan(name="y", phases=[Phase(name="z", steps=1)])
    (folder / "phases").mkdir(parents=True)
    for name in ("phases/mine.txt", "results.json", "notes.txt"):
        (folder / name).write_text("{}")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="--overwrite to write into it"):
        run(idle, model, data, folder)
    run(idle, model, data, folder, overwrite=True)
    assert (folder / "phases/mine.txt").exists()
    run(idle, model, data, folder, overwrite=True)
    assert not (folder / "phases/mine.txt").exists()
    assert not (folder / "adapter_config.json").exists()
    assert (folder / "notes.txt").exists()


def test_keeping_the_best_without_evaluations_is_refused(model, data, tmp_path):
    plan = FineTuningPlan(name="x", phases=[Phase(name="x", epochs=1, keep="best")])
    with pytest.raises(InputError, match="Received: eval_strategy=no"):
        run(plan, model, data, tmp_path / "run", eval_strategy="no")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [{"learning_rate_low": 1e-6}, {"group_learning_rates": [1e-5] * 8}])
def test_rates_of_the_groups_replace_the_plans_factor(given, tmp_path):
    args = run_arguments(FineTuningPlan.load("baseline"), tmp_path, given)
    assert args.discriminative_factor is None
    assert run_arguments(FineTuningPlan.load("baseline"), tmp_path, {}).discriminative_factor == 1


def test_cycles_of_the_runs_own_schedule_are_counted(model, data, tmp_path):
    """Overfit at its second evaluation, were it not for the cycle of 1 + 2 epochs that it is in."""
    phase = Phase(name="x", learning_rate=1e-30, until_overfit=UntilOverfit(patience=1, max_epochs=4))
    settings = {"lr_scheduler_type": "sgdr", "lr_scheduler_kwargs": {"cycle_len": 1, "cycle_mult": 2}}
    plan = FineTuningPlan(name="x", settings=settings, phases=[phase])
    assert run(plan, model, data, tmp_path / "run").phases[0].epochs == 3
