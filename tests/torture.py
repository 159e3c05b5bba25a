"""Kills a run with SIGKILL at random moments, resumes it until it is done, and compares it with one left alone.

    python tests/torture.py --runs 50            a four-phase plan of this package
    python tests/torture.py --runs 50 --plain    the same four phases in plain `Trainer`s
    python tests/torture.py --runs 50 --plan fastai_eight_steps    a shipped plan, with range tests and precomputing

Every second run is killed inside the writing of a checkpoint. "Identical" means: final weights to the bit, the states
of all phases (steps, log with every loss and rate, best metric) and the final metrics.
"""

import argparse
import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from datasets import disable_progress_bars
from safetensors.torch import load_file
from tiny_text import colour_folder, model_folder, tiny_tokenizer
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from ulmfit_tools import FineTuningPlan, Phase, UntilOverfit, load_text_classification, run_plan
from ulmfit_tools.data import tokenize
from ulmfit_tools.freezing import set_trainable
from ulmfit_tools.layers import layer_groups

PLAN = FineTuningPlan(
    name="torture",
    settings={"learning_rate": 3e-3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    phases=[
        Phase(name="head", train="head", epochs=1),
        Phase(name="top", train="top_half", epochs=1.5, schedule="sgdr", schedule_settings={"cycle_len": 0.5}),
        Phase(name="all", epochs=2, keep="best"),
        Phase(name="last", until_overfit=UntilOverfit(patience=1, max_epochs=4), learning_rate=0.05),
    ],
)
COMMON = {"use_cpu": True, "disable_tqdm": True, "seed": 11, "logging_steps": 1, "save_strategy": "steps"}


def run_ours(base: Path, folder: Path, plan: str | None = None) -> None:
    """One attempt at the plan: from the beginning, or from wherever the last attempt was stopped."""
    # A cache for each run, so that computing it is among what is killed.
    os.environ["ULMFIT_TOOLS_CACHE"] = str(folder.with_name(f"{folder.name}-cache"))
    # Evaluation by the same steps as saving, as `keep: best` writes a checkpoint at each evaluation.
    steps = {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "logging_nan_inf_filter": False}
    if plan is not None:  # its cycles end with epochs, and are evaluated there
        steps = {"per_device_train_batch_size": 8, "save_strategy": "epoch"}
    names = {"model": str(base / "model"), "data": str(base / "data")}
    run_plan(plan or PLAN, **names, output_dir=folder, resume=True, **COMMON | steps)


def run_plain(base: Path, folder: Path) -> None:
    """The same phases as a careful user of plain `Trainer` writes them, resumed from each phase's last checkpoint."""
    data = load_text_classification(str(base / "data"))
    rows = tokenize(data, tiny_tokenizer())
    start: Path = base / "model"
    for index, phase in enumerate(PLAN.phases):
        here = folder / phase.name
        done = here / "done"
        if (done / "finished").exists():
            start = done
            continue
        set_seed(11)
        labels = {"num_labels": 3, "id2label": dict(enumerate(data.label_names))}
        model = AutoModelForSequenceClassification.from_pretrained(start, **labels)
        groups = layer_groups(model)
        set_trainable(model, groups, phase.groups_to_train(groups.names))
        best = phase.keep == "best"
        args = TrainingArguments(
            output_dir=str(here),
            num_train_epochs=phase.epochs or 3,
            learning_rate=3e-3,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            train_sampling_strategy="group_by_length",
            save_steps=2,
            save_total_limit=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=best,
            **COMMON | {"seed": 11 + index},
        )
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=rows["train"],
            eval_dataset=rows["validation"],
            data_collator=DataCollatorWithPadding(tiny_tokenizer()),
        )
        checkpoint = get_last_checkpoint(str(here)) if here.is_dir() else None
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(str(done))
        trainer.save_state()
        (done / "finished").touch()
        start = done
    shutil.copy(start / "model.safetensors", folder / "model.safetensors")


def attempt(job: Callable[[], None], kill: Callable[[float], bool] | None, error: Path) -> str:
    """Run `job` in a forked process; `kill(seconds)` is asked every millisecond whether to kill it now.

    What a crashed one raised is in the file `error`.

    Returns:
        `done`, `killed` or `crashed`.
    """
    child = os.fork()
    if child == 0:
        os.setpgrp()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            job()
            os._exit(0)
        except BaseException:
            error.write_text(traceback.format_exc())
            os._exit(1)
    started = time.monotonic()
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return "done" if status == 0 else "killed" if os.WIFSIGNALED(status) else "crashed"
        if kill is not None and kill(time.monotonic() - started):
            os.kill(child, signal.SIGKILL)
            kill = None
        time.sleep(0.001)


def killer(rng: random.Random, duration: float, folder: Path, in_writing: bool) -> Callable[[float], bool]:
    """Kill at a random second of the run, or, for `in_writing`, a moment after a checkpoint begins to be written."""
    if not in_writing:
        when = rng.uniform(0.0, duration)
        return lambda seconds: seconds >= when
    skipped, seen, delay = rng.randrange(6), set(), rng.uniform(0.0, 0.02)
    due = [float("inf")]

    def kill(seconds: float) -> bool:
        try:
            fresh = {p for pattern in ("**/.incomplete-*", "**/checkpoint-*") for p in folder.glob(pattern)} - seen
        except FileNotFoundError:  # a folder was renamed while it was looked through
            return seconds >= due[0]
        seen.update(fresh)
        if len(seen) > skipped and fresh:
            due[0] = min(due[0], seconds + delay)
        return seconds >= due[0]

    return kill


def outcome(folder: Path) -> dict:
    """What is compared: the final weights, each phase's state, the metrics."""
    states = {}
    for path in sorted(folder.rglob("trainer_state.json")):
        if "checkpoint-" in str(path):
            continue
        state = json.loads(path.read_text())
        for entry in state["log_history"]:
            for key in [key for key in entry if key.endswith(("runtime", "per_second"))]:
                del entry[key]
        state["best_model_checkpoint"] = state["best_model_checkpoint"] and Path(state["best_model_checkpoint"]).name
        states[path.parent.name] = state
    metrics = None
    if (folder / "results.json").exists():
        result = json.loads((folder / "results.json").read_text())
        metrics = result["metrics"], [phase["metrics"] for phase in result["phases"]]
    return {"weights": load_file(folder / "model.safetensors"), "states": states, "metrics": metrics}


def difference(expected: dict, got: dict) -> str:
    """Empty for identical outcomes, else what differs."""
    weights = expected["weights"], got["weights"]
    parts = []
    same_keys = weights[0].keys() == weights[1].keys()
    if not same_keys or not all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0]):
        parts.append("weights")
    parts += [part for part in ("states", "metrics") if expected[part] != got[part]]
    return ", ".join(parts)


def torture(
    runs: int, plain: bool, seed: int = 0, plan: str | None = None, report: Callable[[str], None] = print
) -> Counter:
    """Kill and resume `runs` times, each run from the start; count the outcomes.

    Returns:
        `identical`, `different` and `crashed` (cannot be resumed at all) with their counts, and `kills`.
    """
    torch.set_num_threads(1)  # forked processes must not inherit a pool of threads
    # tqdm's lock is shared by all forked processes: one that is killed while it holds it would stop all later ones.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    logging.set_verbosity_error()
    disable_progress_bars()
    rng = random.Random(seed)
    counts: Counter = Counter(identical=0, different=0, crashed=0, kills=0)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        model_folder(base / "model", hidden_dropout_prob=0.1)
        colour_folder(base / "data", train=72, validation=24, test=24)
        run = run_plain if plain else functools.partial(run_ours, plan=plan)
        started = time.monotonic()
        if attempt(lambda: run(base, base / "whole"), None, base / "error") != "done":
            raise RuntimeError(f"the uninterrupted run failed: {(base / 'error').read_text()}")
        duration = time.monotonic() - started
        expected = outcome(base / "whole")
        for number in range(runs):
            folder = base / f"run{number}"
            result, attempts = "killed", 0
            while result == "killed":
                attempts += 1
                # At most four kills a run, so that it ends.
                kill = killer(rng, duration, folder, in_writing=number % 2 == 1) if attempts <= 4 else None
                result = attempt(lambda folder=folder: run(base, folder), kill, base / "error")
                counts["kills"] += result == "killed"
            what = "crashed" if result == "crashed" else difference(expected, outcome(folder))
            counts["crashed" if what == "crashed" else "different" if what else "identical"] += 1
            report(f"run {number + 1}: {attempts} attempts, {what or 'identical'}")
            if what == "crashed":
                report((base / "error").read_text())
            shutil.rmtree(folder, ignore_errors=True)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--plain", action="store_true", help="plain Trainer instead of a plan")
    parser.add_argument("--plan", help="a shipped plan; default: one of four phases")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    print(dict(torture(flags.runs, flags.plain, flags.seed, flags.plan)))
