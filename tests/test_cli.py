"""The command line on a tiny model: what it prints, writes and refuses."""

import functools
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_text import COLOURS, colour_folder, colour_texts, model_folder, write_csv
from tqdm.auto import tqdm

from ulmfit_tools import FineTuningPlan, InputError, LRCurve, cli, inference, load_text_classification
from ulmfit_tools.activation_store import Entry, build
from ulmfit_tools.cli import main
from ulmfit_tools.cli_flags import DataFlags, GroupFlags, ModelFlags, TrainFlags

RECIPES = Path(__file__).parent.parent / "recipes"
QUICK = ["--use_cpu", "--disable_tqdm", "true", "--per_device_train_batch_size", "16", "--learning_rate", "1e-2"]
QUICK += ["--discriminative_factor", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(model_folder(tmp_path_factory.mktemp("model"), initializer_range=0.2, num_hidden_layers=2))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(colour_folder(tmp_path_factory.mktemp("data"), train=192))


@pytest.fixture(scope="module")
def trained(model, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--model", model, "--dataset", data, "--output_dir", str(folder), "--num_train_epochs", "12", *QUICK]
    assert main(["train", *flags]) == 0
    return folder


def refused(capsys, *argv):
    """The one line that a refused command prints; it must exit with 2."""
    assert main([str(part) for part in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("ulmfit-tools: ")
    return lines[0]


def test_train_learns_and_leaves_a_model_folder(trained):
    result = json.loads((trained / "results.json").read_text())
    assert result["metrics"]["test"]["accuracy"] > 0.9  # one word decides the label; chance is 0.33
    assert (trained / "model.safetensors").exists()


def test_evaluate_agrees_with_the_run(trained, data, capsys, tmp_path):
    assert main(["evaluate", "--model", str(trained), "--dataset", data, "--json", str(tmp_path / "e.json")]) == 0
    table = capsys.readouterr().out
    assert "guessed" not in table  # the columns are the run's
    assert all(label in table for label in COLOURS)
    scores = json.loads((tmp_path / "e.json").read_text())
    recorded = json.loads((trained / "results.json").read_text())["metrics"]["test"]
    assert (scores["split"], scores["rows"]) == ("test", 24)
    assert scores["metrics"] == {key: recorded[key] for key in scores["metrics"]}
    flags = ["evaluate", "--model", "no/model", "--dataset", data, "--json"]  # said before anything is loaded
    assert "exists already" in refused(capsys, *flags, tmp_path / "e.json")
    assert "its folder" in refused(capsys, *flags, tmp_path / "nowhere" / "e.json")


def test_predict_text_file_and_output(trained, tmp_path, capsys):
    assert main(["predict", "--model", str(trained), "--text", "the blue sea", "a red leaf"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "sea" in line or "leaf" in line]
    assert "cold" in lines[0]
    assert "warm" in lines[1]
    texts = write_csv(tmp_path / "texts.csv", [(text,) for text, _ in colour_texts(5)], header=("text",))
    output = tmp_path / "labels.csv"
    assert main(["predict", "--model", str(trained), "--file", str(texts), "--output", str(output)]) == 0
    rows = output.read_text().splitlines()
    assert rows[0] == "text,label,score"
    assert [row.split(",")[0] for row in rows[1:]] == [text for text, _ in colour_texts(5)]
    assert "exists already" in refused(capsys, "predict", "--model", trained, "--file", texts, "--output", output)
    nowhere = tmp_path / "nowhere" / "labels.csv"
    assert "its folder" in refused(capsys, "predict", "--model", "no/model", "--file", texts, "--output", nowhere)


def test_predict_reads_the_columns_of_the_run(model, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "run")
    record = {"data": {"text_columns": ["review"]}, "settings": {}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    both = write_csv(tmp_path / "both.csv", [("an id", "red sky")], header=("text", "review"))
    flags = ["predict", "--model", str(tmp_path / "run"), "--file"]
    assert main([*flags, str(both)]) == 0
    printed = capsys.readouterr().out
    assert "red sky" in printed
    assert "guessed" not in printed
    assert main([*flags, str(write_csv(tmp_path / "other.csv", [("blue sea",)], header=("comment",)))]) == 0
    printed = capsys.readouterr().out
    assert "blue sea" in printed
    assert 'Text column: "comment" (guessed; --text_column says otherwise).' in printed
    line = refused(capsys, *flags, both, "--text_column", "text,review")
    assert "trained on single texts (review)" in line


def test_predict_lets_a_model_run_code_of_its_own_where_told(capsys, monkeypatch):
    def load(name, *, trust_remote_code):
        raise InputError(f"trust_remote_code={trust_remote_code}")

    monkeypatch.setattr(inference, "load_model_and_tokenizer", load)
    flags = ["predict", "--model", "own/code", "--text", "red sky"]
    assert "trust_remote_code=False" in refused(capsys, *flags)
    assert "trust_remote_code=True" in refused(capsys, *flags, "--trust_remote_code")


def test_groups_prints_every_group_with_its_rate(model, capsys):
    assert main(["groups", "--model", model, "--learning_rate", "1e-3", "--discriminative_factor", "10"]) == 0
    out = capsys.readouterr().out
    assert "4 layer groups" in out
    rates = {"embeddings": "1.00e-06", "layer.0": "1.00e-05", "layer.1": "1.00e-04", "head": "1.00e-03"}
    for name, rate in rates.items():
        assert any(name in line and rate in line for line in out.splitlines()), (name, rate)
    assert "100.0%" in out


def test_groups_shows_the_rates_of_the_default_plan():
    assert GroupFlags().learning_rate == FineTuningPlan.load(TrainFlags().plan).settings["learning_rate"]


def test_lr_find_prints_draws_and_writes(model, data, tmp_path, capsys):
    picture, curve = tmp_path / "curve.png", tmp_path / "curve.json"
    files = ["--plot", str(picture), "--json", str(curve)]
    flags = ["lr-find", "--model", model, "--dataset", data, "--use_cpu", *files]
    assert main([*flags, "--num_steps", "60"]) == 0
    suggestion = LRCurve.from_json(curve.read_text()).suggestion
    assert 1e-7 < suggestion < 10
    printed = capsys.readouterr().out
    assert f"{suggestion:.2e}" in printed
    assert 'Text column: "text" (guessed' in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "exists already" in refused(capsys, *flags)
    assert "start_lr" in refused(capsys, "lr-find", "--model", model, "--dataset", data, "--use_cpu", "--start_lr", 11)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--json", ""], "The file to write needs a name. Received: ''"),
        (["--plot", ""], "The file to write needs a name. Received: ''"),
        (["--plot", "curve.txt"], "--plot is a picture file, as curve.png"),
        (["--plot", "curve.png"], "cannot be written as .png here (no TeX): try .png"),
    ],
)
def test_a_picture_or_file_that_cannot_be_written_is_refused_first(flags, words, capsys, tmp_path, monkeypatch):
    def savefig(self, *args, **kwargs):
        raise RuntimeError("no TeX")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    assert words in refused(capsys, "lr-find", "--model", "no/model", "--dataset", "no.csv", *flags)


def test_lr_find_takes_what_train_takes(model, data, tmp_path, capsys):
    """A config file, evaluation and checkpoints, which it does without, and the loss on the validation split."""
    config = tmp_path / "find.yaml"
    config.write_text(f"model: {model}\ndataset: {data}\nuse_cpu: true\nnum_steps: 19\neval_batches: 1\n")
    curve = tmp_path / "curve.json"
    flags = ["lr-find", "--config", config, "--json", curve, "--eval_strategy", "epoch", "--eval_on_start", "true"]
    assert "Received: num_steps=19" in refused(capsys, *flags)
    flags += ["--num_steps", "20", "--load_best_model_at_end", "true", "--push_to_hub", "true"]
    assert main([str(flag) for flag in flags]) == 0
    assert json.loads(curve.read_text())["loss_on"] == "evaluation"


def test_lr_find_does_not_look_for_unused_parameters(model, data, tmp_path):
    flags = (ModelFlags(model=model), DataFlags(dataset=data), None, {"use_cpu": True})
    assert cli._range_trainer(*flags, str(tmp_path)).args.ddp_find_unused_parameters is False


def test_lr_find_splits_as_it_is_told(model, tmp_path, capsys):
    rare = write_csv(tmp_path / "rare.csv", [*colour_texts(96), ("the sky", "rare")])
    flags = ["lr-find", "--model", model, "--dataset", str(rare), "--use_cpu", "--num_steps", "20"]
    assert "set --validation_split 0 to train without" in refused(capsys, *flags)
    assert main([*flags, "--validation_split", "0"]) == 0
    assert "rare.csv: train 97 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plot", "no/such/curve.png"], "No such file.*its folder, no/such, must exist"),
        (["--json", "no/such/curve.json"], "No such file.*its folder, no/such, must exist"),
        (["--json", "/proc/curve.json"], "/proc/curve.json cannot be written"),
        (["--json", f"{'x' * 300}.json"], "cannot be written .File name too long"),
        (["--gradient_accumulation_steps", "0"], "at least 1. Received: 0"),
        (["--gradient_accumulation_steps", "-1"], "at least 1. Received: -1"),
        (["--seed", "-1"], "--seed is at least 0"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers is at least 0"),
        (["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size must be positive"),
        (["--plot", "curve.xyz"], ".png, .ps.*Received: curve.xyz"),
        (["--plot", "curve"], ".png, .ps.*Received: curve"),
        (["--lr_scheduler_kwargs", '{"peak": 1}'], "peak"),
        (["--lr_scheduler_kwargs", '{"peak"'], "delimiter"),
        (["--accelerator_config", "no_such.json"], "no_such.json"),
        (["--deepspeed", "no_such.json"], "deepspeed"),
        (["--plot", "one.png", "--json", "./one.png"], "a file each"),
        (["--config", "no_such.yaml"], "no_such.yaml"),
        (["--eval_bathces", "1"], 'Did you mean "--eval_batches"'),
    ],
)
def test_lr_find_refuses_before_it_loads(capsys, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "lr-find", "--model", "no/model", "--dataset", "no_data.csv", "--use_cpu", *flags)
    assert re.search(message, line), line
    assert not list(tmp_path.iterdir())


def test_lr_find_says_that_matplotlib_is_missing_before_it_loads(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    flags = ["--model", "no/model", "--dataset", "no_data.csv", "--plot", "curve.png"]
    assert "need matplotlib" in refused(capsys, "lr-find", *flags)


def test_lr_find_of_no_training_is_refused(model, data, capsys):
    flags = ["--model", model, "--dataset", data, *QUICK[:3]]
    assert "--num_train_epochs must be positive. Received: 0" in refused(
        capsys, "lr-find", *flags, "--num_train_epochs", "0"
    )
    assert "Invalid beta parameter" in refused(capsys, "lr-find", *flags, "--adam_beta1", "2")


def interrupted(argv):
    """Ctrl-C."""
    raise KeyboardInterrupt


def test_an_interrupted_command_says_what_applies_to_it(capsys, monkeypatch):
    assert cli.run(interrupted, []) == 130
    assert capsys.readouterr().err == "ulmfit-tools: interrupted\n"
    monkeypatch.setattr(cli, "config_flags", interrupted)
    for command in (cli.train, functools.partial(cli.train, settings={"plan": "baseline"})):
        assert cli.run(command, []) == 130
        assert "--resume goes on" in capsys.readouterr().err


@pytest.mark.parametrize("error", [InputError("no such thing"), KeyboardInterrupt()])
def test_the_line_of_an_error_stands_below_the_bars_that_it_leaves(error, capsys):
    def fails(argv):
        outer = tqdm(total=3)
        inner = tqdm(total=3, leave=False)
        inner.update()
        outer.update()
        raise error

    assert cli.run(fails, []) in (2, 130)
    before, _, line = capsys.readouterr().err.rpartition("\n")[0].rpartition("\n")
    assert "| 1/3 [" in before
    assert line.startswith("ulmfit-tools: ")


def test_config_file_serves_and_flags_win(model, data, tmp_path):
    config = tmp_path / "run.yaml"
    lines = [f"model: {model}", f"dataset: {data}", "plan: baseline", "learning_rate: 2e-3", "num_train_epochs: 1"]
    config.write_text("\n".join([*lines, "use_cpu: true", ""]))
    folder = tmp_path / "run"
    assert main(["train", "--config", str(config), "--output_dir", str(folder), "--learning_rate", "4e-3"]) == 0
    record = json.loads((folder / "run.json").read_text())
    assert record["plan"]["name"] == "baseline"
    assert record["settings"]["learning_rate"] == 4e-3  # flag over file
    assert record["settings"]["num_train_epochs"] == 1  # file over plan
    assert record["settings"]["per_device_train_batch_size"] == 8  # plan over default


def test_the_seed_of_a_plan_decides_what_is_held_out(model, tmp_path):
    plan = tmp_path / "seeded.yaml"
    plan.write_text("name: seeded\nsettings: {seed: 7}\nphases:\n  - {name: head, train: head, steps: 1}\n")
    texts = write_csv(tmp_path / "texts.csv", colour_texts(48))
    flags = ["--model", model, "--dataset", str(texts), "--plan", str(plan), "--use_cpu"]
    for seed, more in ((7, []), (9, ["--seed", "9"])):
        folder = tmp_path / f"run{seed}"
        assert main(["train", *flags, "--output_dir", str(folder), *more]) == 0
        record = json.loads((folder / "run.json").read_text())
        assert record["data"]["fingerprint"] == load_text_classification(texts, seed=seed).fingerprint


@pytest.mark.parametrize("rank", [0, 1])
def test_the_data_are_described_by_the_main_process_alone(trained, model, data, capsys, monkeypatch, request, rank):
    monkeypatch.setenv("RANK", str(rank))
    request.addfinalizer(lambda: logging.getLogger("ulmfit_tools").setLevel(logging.NOTSET))  # `run` lowers it
    flags = ["--model", model, "--dataset", data, "--output_dir", str(trained), "--use_cpu", "--resume"]
    assert main(["train", *flags]) == 2  # its settings are others
    assert capsys.readouterr().out.count("train 192") == (rank == 0)


def test_a_plan_is_no_config_file(tmp_path, capsys):
    plan = tmp_path / "mine.yaml"
    plan.write_text("name: mine\nphases:\n  - {name: head, train: head, steps: 1}\n")
    assert refused(capsys, "train", "--config", plan).endswith(f"give it by --plan {plan}")


def test_resume_of_a_complete_run_does_nothing(trained, model, data):
    before = (trained / "model.safetensors").stat().st_mtime_ns
    flags = ["--model", model, "--dataset", data, "--output_dir", str(trained), "--num_train_epochs", "12", *QUICK]
    assert main(["train", *flags, "--resume"]) == 0
    assert (trained / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lerning_rate", "1"], 'Did you mean "--learning_rate"'),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--plan", "gradual_unfreezin"], 'Did you mean "gradual_unfreezing"'),
        (["--plan", "nowhere.yaml"], "no file nowhere.yaml"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--dataset", "no_such.csv"], "no_such.csv"),
        (["--text_column", "txt"], "text"),
        (["--lr_scheduler_type", "slanted"], "slanted_triangular"),
        (["--config", "no_such.yaml"], "no_such.yaml"),
        (["--config"], "argument --config: expected one argument"),
        (["--max_steps", "5"], "max_steps has no place"),
        (["--num_train_epochs", "-1"], "num_train_epochs"),
    ],
)
def test_wrong_flag_is_one_line(model, data, tmp_path, capsys, flags, message):
    folder = tmp_path / "run"
    line = refused(capsys, "train", "--model", model, "--dataset", data, "--output_dir", folder, "--use_cpu", *flags)
    assert message in line
    assert not folder.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "-1"], "learning_rate must be positive"),
        (["--max_steps", "5"], "max_steps has no place"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--output_dir", "a.csv"], "a.csv is a file: name another. Received: a.csv"),
        (["--output_dir", "a.csv/run"], "a.csv is a file: name another. Received: a.csv/run"),
        (["--output_dir", "."], "is not empty"),
        (["--output_dir", "/proc/no/run"], "cannot be written to (/proc: No such file"),
    ],
)
def test_what_needs_no_data_is_refused_before_they_are_read(tmp_path, capsys, monkeypatch, flags, message):
    if "/proc/no/run" in flags and not Path("/proc").is_dir():
        pytest.skip("there is no /proc here, the one place where root too can make no folder")
    (tmp_path / "a.csv").touch()
    monkeypatch.chdir(tmp_path)
    where = ["--model", "no/model", "--dataset", "no_data.csv", "--output_dir", "run", "--use_cpu"]
    assert message in refused(capsys, "train", *where, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_a_flag_that_serves_some_phases_is_said_once(model, data, tmp_path, caplog):
    flags = ["--model", model, "--dataset", data, "--output_dir", str(tmp_path / "run"), "--num_train_epochs", "1"]
    with caplog.at_level(logging.WARNING):
        assert main(["train", *flags, *QUICK]) == 0
    assert caplog.text.count("--num_train_epochs serves 'all' of the plan's phases.") == 1


def test_evaluate_reads_the_label_column_of_the_run(model, tmp_path, capsys):
    rows = [(text, label, label[0]) for text, label in colour_texts(48)]
    both = str(write_csv(tmp_path / "both.csv", rows, header=("text", "coarse_label", "fine_label")))
    train = ["train", "--model", model, "--dataset", both, "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    plan = tmp_path / "plan.yaml"
    plan.write_text("name: x\nphases:\n  - {name: head, train: head, steps: 1}\n")
    assert main([*train, "--plan", str(plan), "--label_column", "coarse_label"]) == 0
    flags = ["evaluate", "--model", str(tmp_path / "run"), "--dataset"]
    assert main([*flags, both]) == 0
    assert "warm" in capsys.readouterr().out
    assert "does not know: c, g, w" in refused(capsys, *flags, both, "--label_column", "fine_label")
    other = str(write_csv(tmp_path / "other.csv", colour_texts(9)))
    assert main([*flags, other]) == 0
    assert 'Label column: "label" (guessed' in capsys.readouterr().out
    line = refused(capsys, *train, "--plan", plan, "--label_column", "fine_label", "--resume")
    assert 'made otherwise: data.label_column: "coarse_label" -> "fine_label"; data.label_names: ["cold", ' in line
    assert re.search(r"; and \d+ more\. Give what that run was given, or --overwrite to start anew", line)
    assert "model." not in line


def test_occupied_folder_is_refused_and_left_alone(trained, model, data, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    flags = ["train", "--model", model, "--dataset", data, "--output_dir", trained, "--plan", "baseline", "--use_cpu"]
    assert "holds a run already" in refused(capsys, *flags)
    assert "plan.name" in refused(capsys, *flags, "--resume")
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*")}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "no command 'trian'.*Did you mean \"train\""),
        (["train"], "needs --model"),
        (["train", "--model", "x"], "needs --dataset"),
        (["train", "--model", "x", "--dataset", "y"], "needs --output_dir"),
        (["predict", "--model", "x"], "--text"),
        (["groups"], "needs --model"),
    ],
)
def test_incomplete_command_says_what_it_needs(capsys, argv, message):
    assert re.search(message, refused(capsys, *argv))


def test_cache_tells_its_size_and_is_removed(tmp_path, capsys):
    made = Entry(tmp_path / ("ab" * 16), np.array([2, 1]), 4)
    made.prepare()
    build([made], np.arange(2), lambda rows: [([torch.ones(made.lengths[row], 4) for row in rows], [])])
    assert main(["cache", "--folder", str(tmp_path)]) == 0
    assert ": 1 set of activations, 0.0 MiB" in capsys.readouterr().out
    assert main(["cache", "--folder", str(tmp_path), "--remove"]) == 0
    assert "freed" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert "There is no folder" in refused(capsys, "cache", "--folder", tmp_path / "nowhere")


def test_overview_and_version(capsys):
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in ("train", "groups", "evaluate", "predict"))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ulmfit-tools ")


def test_recipe_takes_the_flags_of_train(model, data, tmp_path):
    flags = ["--model", model, "--dataset", data, "--plan", "baseline", "--num_train_epochs", "1", "--use_cpu"]
    command = [sys.executable, str(RECIPES / "fine_tune.py"), *flags, "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Plan 'baseline'" in done.stdout
    wrong = subprocess.run([*command, "--output_dir", str(tmp_path / "run")], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "holds a run already" in wrong.stderr
