"""The same command on each of the real datasets, with nothing but paths and column names changed."""

import json

import pytest
from tiny_text import model_folder

from ulmfit_tools.cli import main

pytestmark = [pytest.mark.real_data, pytest.mark.slow]

DATASETS = {
    "trec": (["--label_column", "coarse_label"], 6, {"train": 4906, "validation": 546, "test": 500}),
    "sst2": ([], 2, {"train": 6920, "validation": 872, "test": 1821}),
    "clinc150": (["--label_column", "intent"], 151, {"train": 15100, "validation": 3100, "test": 5500}),
    "movie_reviews_long": ([], 2, {"train": 1620, "validation": 180, "test": 200}),
}


@pytest.mark.parametrize("name", DATASETS)
def test_train(name, real_data, tmp_path):
    flags, labels, rows = DATASETS[name]
    plan = tmp_path / "plan.yaml"
    plan.write_text("name: short\nphases: [{name: all, steps: 2}]\n")
    model = str(model_folder(tmp_path / "model", num_hidden_layers=1))
    common = ["--model", model, "--dataset", str(real_data / name), "--plan", str(plan), "--use_cpu"]
    assert main(["train", *common, *flags, "--output_dir", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert len(record["data"]["label_names"]) == labels
    assert sum(record["data"]["rows"].values()) == sum(rows.values())
    assert record["data"]["rows"]["test"] == rows["test"]
    assert set(json.loads((tmp_path / "run/results.json").read_text())["metrics"]) == {"validation", "test"}
