"""Range tests in two processes on a CPU; `lr_range_worker.py` is what they run."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tiny import ragged_rows

KINDS = ("Trainer", "accumulating", "ULMFiTTrainer")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the two processes found; a rank that waits for ever ends in the time limit."""
    folder, here = tmp_path_factory.mktemp("two"), Path(__file__).parent
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parent)}
    command += [str(here / "lr_range_worker.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_training_after_it_is_training_without_it(found, kind):
    for rank in found:
        assert rank[kind]["with"] == rank[kind]["without"]


@pytest.mark.parametrize("kind", KINDS)
def test_both_see_the_same_curve_and_end_after_the_same_step(found, kind):
    first, second = (rank[kind]["curves"] for rank in found)
    assert first == second
    assert all(len(curve["losses"]) > 5 for curve in first)


def test_nan_in_one_process_ends_both(found):
    assert found[0]["one diverges"] == found[1]["one diverges"] == ["nan", 14]


def test_both_take_the_rate_from_one_file(found):
    rates = {rate for rank in found for rate in rank["found"]}
    assert len(rates) == 1


def test_the_entropy_is_of_the_labels_that_both_met(found):
    """25 updates of 8 rows are five times all 40."""
    shares = [count / 40 for count in Counter(row["labels"] for row in ragged_rows(40)).values()]
    entropy = -sum(share * math.log(share) for share in shares)
    assert found[0]["entropy"] == found[1]["entropy"] == pytest.approx(entropy, abs=1e-6)
