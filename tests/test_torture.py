"""Runs killed at random moments, inside the writing of checkpoints too, end like runs that were left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_text import colour_folder, model_folder

TESTS = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes to kill them")]


@pytest.mark.parametrize(("runs", "more"), [(50, []), (8, ["--plan", "fastai_eight_steps"])])
def test_killed_runs_end_with_the_same_bits(runs, more):
    # In a process of its own: it forks, and must not inherit the threads of this one.
    command = [sys.executable, TESTS / "torture.py", "--runs", str(runs), *more]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1].replace("'", '"'))
    assert counts["kills"] > runs
    assert (counts["identical"], counts["different"], counts["crashed"]) == (runs, 0, 0), done.stdout


def test_sigterm_writes_a_checkpoint_exits_with_143_and_resumes_to_the_same_bits(tmp_path):
    model = model_folder(tmp_path / "model", hidden_dropout_prob=0.1)
    data = colour_folder(tmp_path / "data", train=600)
    flags = ["--model", model, "--dataset", data, "--use_cpu", "--per_device_train_batch_size", "8"]
    train = [sys.executable, "-m", "ulmfit_tools.cli", "train", *map(str, flags), "--output_dir"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    process = subprocess.Popen([*train, str(tmp_path / "run")], stderr=subprocess.PIPE, text=True, env=environment)
    while not (tmp_path / "run/phases/01-head").is_dir():  # the first phase has begun, and with it the listening
        time.sleep(0.05)
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "Stopped by SIGTERM; resume to go on from" in said
    assert list((tmp_path / "run/phases/01-head").glob("checkpoint-*"))

    for folder, more in (("run", ["--resume"]), ("whole", [])):
        subprocess.run([*train, str(tmp_path / folder), *more], check=True, capture_output=True, env=environment)
    stopped, whole = (load_file(tmp_path / folder / "model.safetensors") for folder in ("run", "whole"))
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)
    results = [json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("run", "whole")]
    assert results[0]["metrics"] == results[1]["metrics"]
