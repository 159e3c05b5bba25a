"""Two processes on a CPU that are stopped and resumed; `resume_worker.py` is what they run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ulmfit_tools.checkpoints import verify


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder, here = tmp_path_factory.mktemp("two"), Path(__file__).parent
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parent)}
    command += [str(here / "resume_worker.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def found_by(folder: Path) -> list[dict]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_both_end_the_same_to_the_bit_wherever_they_were_stopped(two_processes):
    for found in found_by(two_processes):
        assert (found["processes"], found["steps"]) == (2, 10)
        assert {key: value for key, value in found.items() if key.startswith("resumed") and value} == {}
        assert "resumed after damage" in found


def test_a_signal_to_one_stops_both_after_the_same_step(two_processes):
    for found in found_by(two_processes):
        assert found["stopped"] == 4
        assert found["checkpoints"] == list(range(1, 11))


def test_a_checkpoint_holds_the_random_numbers_of_both(two_processes):
    folder = two_processes / "whole" / "checkpoint-7"
    assert verify(folder) == []
    assert {"rng_state_0.pth", "rng_state_1.pth"} < {path.name for path in folder.iterdir()}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} < manifest["files"].keys()
    assert len(json.loads((folder / "ulmfit_state.json").read_text())["loss"]["since_last_log"]) == 2
