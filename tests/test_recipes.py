"""The recipes run as they stand, on tiny models and data."""

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_text import model_folder

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(model_folder(tmp_path_factory.mktemp("model")))


def python(*command, cwd, **more):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | more
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_plain_trainer(model, data, tmp_path):
    source = (RECIPES / "plain_trainer.py").read_text()
    for name, value in (("MODEL", model), ("DATASET", data)):
        source, count = re.subn(rf'^{name} = ".*?"', f'{name} = "{value}"', source, flags=re.M)
        assert count == 1
    (tmp_path / "recipe.py").write_text(source)
    printed = python("recipe.py", cwd=tmp_path).stdout
    assert "test_accuracy" in printed.splitlines()[-1]
    assert len(source.splitlines()) < 65


@pytest.mark.slow
def test_fine_tune_in_two_processes(model, data, tmp_path):
    config = RECIPES / "accelerate_configs" / "two_cpu_processes.yaml"
    flags = ["--model", model, "--dataset", data, "--use_cpu", "--output_dir", "run", "--num_train_epochs", "1"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", config, RECIPES / "fine_tune.py", *flags]
    done = python(*launch, "--per_device_train_batch_size", "8", cwd=tmp_path)
    for once in ("train 96", "Phase 1 of 2", "Plan 'gradual_unfreezing'"):
        assert (done.stdout + done.stderr).count(once) == 1, once  # by the main process alone
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["processes"] == 2
    result = json.loads((tmp_path / "run/results.json").read_text())
    assert [phase["steps"] for phase in result["phases"]] == [6, 6]  # 96 rows in batches of 2 x 8


@pytest.mark.slow
def test_plans_benchmark(model, data, tmp_path):
    flags = ["--model", model, "--dataset", data, "--plans", "baseline", "baseline@1e-4", "--seeds", "1", "2"]
    flags += ["--train_rows", "40"]
    printed = python(RECIPES / "benchmarks/plans.py", *flags, cwd=tmp_path, COLUMNS="160").stdout
    assert [line.split()[1] for line in printed.splitlines()[-3:-1]] == ["baseline", "baseline@1e-4"]
    records = sorted((tmp_path / "runs/benchmarks/plans").rglob("run.json"))
    rates = [json.loads(record.read_text())["settings"]["learning_rate"] for record in records]
    assert rates == [5e-5, 5e-5, 1e-4, 1e-4]
    results = [json.loads(record.with_name("results.json").read_text()) for record in records]
    assert [result["phases"][0]["steps"] for result in results] == [15] * 4  # 3 epochs of 40 rows in batches of 8


@pytest.mark.slow
def test_step_time_benchmark(model, data, tmp_path):
    flags = ["--model", model, "--dataset", data, "--rounds", "1", "--steps", "2"]
    printed = python(RECIPES / "benchmarks/step_time.py", *flags, cwd=tmp_path).stdout
    assert "a step with a rate for each layer group: median" in printed
    assert "an epoch in batches of like length: median" in printed


@pytest.mark.slow
def test_lr_range_cost_benchmark(model, data, tmp_path):
    flags = ["--model", model, "--dataset", data, "--rounds", "1", "--steps", "20"]
    printed = python(RECIPES / "benchmarks/lr_range_cost.py", *flags, cwd=tmp_path).stdout
    assert [name in printed for name in ("plain training", "lr_range_test", "torch-lr-finder")] == [True] * 3


@pytest.mark.slow
def test_precompute_benchmark(model, data, tmp_path):
    flags = ["--model", model, "--dataset", data, "--rounds", "1", "--plain_steps", "2", "--cached_steps", "4"]
    printed = python(RECIPES / "benchmarks/precompute.py", *flags, "--train", "head", cwd=tmp_path).stdout
    row = next(line for line in printed.splitlines() if "head" in line)
    assert "(vector)" in row


@pytest.mark.slow
def test_cache_scaling_benchmark(tmp_path):
    flags = ["--rows", "40", "80", "--steps", "3"]
    printed = python(RECIPES / "benchmarks/cache_scaling.py", *flags, cwd=tmp_path, COLUMNS="120").stdout
    rows = [line.split("\u2502")[1:3] for line in printed.splitlines() if "MiB" in line]
    # 24 tokens of 384 numbers of 4 bytes: 36 KiB a row
    assert [[cell.strip() for cell in row] for row in rows] == [["40", "1 MiB"], ["80", "3 MiB"]]


@pytest.mark.slow
def test_lr_suggestions_benchmark(tmp_path):
    """The table of the measured values that lie beside the recipe; the best two are read off the file by hand."""
    results = RECIPES / "benchmarks/results/lr_suggestions.jsonl"
    flags = ["table", "--results", results, "--tasks", "trec", "--seeds", "0", "--rates", "1e-4", "2e-4"]
    printed = python(RECIPES / "benchmarks/lr_suggestions.py", *flags, cwd=tmp_path).stdout
    assert "2 starts" in printed
    assert "trec, seed 0: 0.912 at 0.0002" in printed
    assert "trec, seed 0, discriminative: 0.925 at 0.0008" in printed


@pytest.mark.slow
def test_lr_usual_limit_benchmark(tmp_path):
    """What is chosen on the other tasks is worse than what is chosen on all, and better than no usual limit."""
    results = RECIPES / "benchmarks/results/lr_suggestions.jsonl"
    printed = python(RECIPES / "benchmarks/lr_usual_limit.py", results, cwd=tmp_path).stdout
    rows = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines()]
    by_task, by_kind = [row[1:-1] for row in rows if row[1:2] == ["all"]]
    assert by_task[-2:] == by_kind[-2:]  # ours and without, on the same starts
    chosen, ours, without = (float(by_task[place]) for place in (3, 5, 6))
    assert ours < chosen < without
    (new_head,) = [row for row in rows if row[1:2] == ["new head"]]
    assert int(new_head[2]) >= 16


def test_lr_other_models_benchmark(model, data, tmp_path, monkeypatch):
    """What was measured, by hand; and every model trains with as many layers as it says."""
    monkeypatch.syspath_prepend(RECIPES / "benchmarks")
    recipe, starts = importlib.import_module("lr_other_models"), importlib.import_module("lr_starts")
    results = RECIPES / "benchmarks/results/lr_other_models.jsonl"
    printed = python(RECIPES / "benchmarks/lr_other_models.py", "table", "--results", results, cwd=tmp_path).stdout
    assert "gpt2: 0.795 at 0.0003" in printed
    monkeypatch.setattr(starts, "TASKS", {"colours": {"source": data}})
    tasks = starts.Tasks(tmp_path, bf16=False, held_out_rows=10, model=model)
    for case in recipe.cases():
        trainer = recipe.make_trainer(replace(case, task="colours"), tasks, str(tmp_path), 1e-3)
        assert trainer.model.config.num_hidden_layers == case.layers
        trainer.args.max_steps = 1
        assert trainer.train().global_step == 1


def test_lr_suggestions_from_a_trained_head(model, data, tmp_path, monkeypatch):
    """The head is trained, what is below it is not, and every trainer of a case begins at the same weights."""
    monkeypatch.syspath_prepend(RECIPES / "benchmarks")
    recipe = importlib.import_module("lr_starts")
    monkeypatch.setattr(recipe, "MODEL", model)
    monkeypatch.setattr(recipe, "TASKS", {"colours": {"source": data}})
    tasks = recipe.Tasks(tmp_path, bf16=False, held_out_rows=10)
    weights = [
        recipe.make_trainer(recipe.Case("colours", 0, True, trained), tasks, str(tmp_path)).model.state_dict()
        for trained in (False, True, True)
    ]
    moved = {name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])}
    assert {name.removesuffix(".weight").removesuffix(".bias") for name in moved} == {
        "bert.pooler.dense",
        "classifier",
    }
    assert all(torch.equal(value, weights[2][name]) for name, value in weights[1].items())


def test_lr_suggestions_on_a_csv_file(model, tmp_path, monkeypatch):
    """A file of one's own is a task: its rows that are not drawn for training are held out."""
    monkeypatch.syspath_prepend(RECIPES / "benchmarks")
    recipe = importlib.import_module("lr_starts")
    rows = [f"row number {row},{'even' if row % 2 == 0 else 'odd'}" for row in range(40)]
    (tmp_path / "parity.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    tasks = recipe.Tasks(tmp_path, bf16=False, held_out_rows=100, model=model)
    train, held_out, names = tasks.load(recipe.Case("parity.csv", 0, False, train_rows=10))
    assert names == ["even", "odd"]
    assert sorted(train["labels"][:]) == [0] * 5 + [1] * 5
    assert len(held_out) == 30


def test_rates_beside_the_best(tmp_path, monkeypatch):
    """Half-way, by the logarithm, to both neighbours of the best; and to those of a new best."""
    monkeypatch.syspath_prepend(RECIPES / "benchmarks")
    recipe, starts = importlib.import_module("lr_suggestions"), importlib.import_module("lr_starts")
    results, case = recipe.Results(tmp_path / "results.jsonl"), starts.Case("trec", 0, False)

    def measured(rate, accuracy):
        results.add(case.key("curve", rate=rate) | {"accuracy": accuracy})
        return recipe.rate_beside(results, case)

    assert measured(1e-4, 0.8) is None  # the best of one has no neighbours
    assert measured(4e-4, 0.9) == 2e-4
    assert measured(8e-4, 0.7) == 2e-4
    assert measured(2e-4, 0.85) == 2.83e-4  # sqrt(2) * 2
    assert measured(2.83e-4, 0.91) is None  # 2.83 / 2 and 4 / 2.83 are below 1.5
    assert measured(5.66e-4, 0.92) is None
