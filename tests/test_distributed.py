"""Two processes on a CPU, which talk over gloo: the same freezing, the same weights, the losses of one process.

`accelerate launch --cpu` starts a single process whatever its `--num_processes`; with `--multi_gpu` and
`TrainingArguments(use_cpu=True)` it starts several on a CPU.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import distributed_worker
import pytest
from accelerate.utils import DistributedType
from unfreezing_runs import trainer_of

from ulmfit_tools.callbacks import GradualUnfreezing
from ulmfit_tools.errors import InputError

KINDS = ["epochs", "chain_thaw", "plateau", "checkpointing", "plan"]


def launch(*arguments, seconds=300):
    """`accelerate launch` this file's worker in two processes."""
    return launch_worker("distributed_worker.py", *arguments, seconds=seconds)


def launch_worker(name, *arguments, seconds=300):
    """`accelerate launch` a script of this folder in two processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    worker = str(Path(__file__).with_name(name))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(
        [*command, worker, *map(str, arguments)], capture_output=True, text=True, timeout=seconds, env=environment
    )


def seen_by(folder, kind):
    return [json.loads((folder / kind / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    distributed_worker.prepare(folder / "plan")
    done = launch(folder, *KINDS, "refusals")
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def test_ddp_that_expects_the_same_layers_in_every_step_is_refused(two_processes):
    first, second = seen_by(two_processes, "refusals")
    assert first == second
    line = "DDP expects the same layers to train in every step: set ddp_find_unused_parameters=True"
    assert [kind for kind, said in first.items() if line in said] == ["find_unused", "checkpointing", "static_graph"]
    assert first["frozen_before"].startswith('DDP was built without "bert.embeddings')


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_sharded_training_is_referred_to_a_plan(tmp_path, monkeypatch, kind):
    state = SimpleNamespace(distributed_type=DistributedType[kind])
    monkeypatch.setattr("ulmfit_tools.gradual_unfreezing.AcceleratorState", lambda: state)
    with pytest.raises(InputError, match=rf"works in one process or with DDP; use a plan. Received: {kind}"):
        trainer_of(tmp_path, GradualUnfreezing()).train()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["epochs", "plan"])
def test_a_killed_process_ends_the_job_soon_and_the_job_can_be_resumed(two_processes, tmp_path, kind):
    distributed_worker.prepare(tmp_path / kind)
    broken = launch(tmp_path, kind, "--die-at", 8)
    ended = time.time()
    died = next((tmp_path / kind).rglob("died"))
    assert broken.returncode != 0
    assert ended - float(died.read_text()) < 60
    assert re.search(r"Signal 9 \(SIGKILL\) received by PID \d+", broken.stderr)
    assert re.search(r"rank\s*: 1 ", broken.stderr)
    assert not (tmp_path / kind / "rank-0.json").exists()

    again = launch(tmp_path, kind, "--resume")
    assert again.returncode == 0, again.stderr[-5000:]
    whole, (first, second) = seen_by(two_processes, kind)[0], seen_by(tmp_path, kind)
    assert first["weights"] == second["weights"] == whole["weights"][6:]  # from the checkpoint of the sixth step on
    assert first["trained"] == whole["trained"][6:]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one_does(two_processes, tmp_path, kind):
    if kind == "plan":
        distributed_worker.prepare(tmp_path)
    one = distributed_worker.train(tmp_path, kind)
    first, second = seen_by(two_processes, kind)
    assert first["trained"] == second["trained"] == one["trained"]
    assert len(set(map(tuple, one["trained"]))) >= 3
    assert first["weights"] == second["weights"]
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-4)
