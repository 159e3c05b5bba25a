"""How good are the rates that learning-rate finders suggest? The true curve, the suggestions, and their regret.

    python recipes/benchmarks/lr_suggestions.py curves     # accuracy after real training at each of 8 rates: hours
    python recipes/benchmarks/lr_suggestions.py sweeps     # range tests on the same runs' starts
    python recipes/benchmarks/lr_suggestions.py table      # what each suggestion would have cost

Every result is a line in the results file as soon as it is there; a command that was stopped goes on where it was.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets, disable_progress_bars
from transformers import DataCollatorWithPadding, PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from ulmfit_tools.data.demo_model import load_model_and_tokenizer
from ulmfit_tools.data.loading import load_text_classification
from ulmfit_tools.data.tokenizing import tokenize
from ulmfit_tools.lr_range import lr_range_test
from ulmfit_tools.trainer import ULMFiTTrainer, ULMFiTTrainingArguments

MODEL = "minilm"
TASKS: dict[str, dict[str, Any]] = {
    "trec": {"source": "trec", "text_columns": "text", "label_column": "coarse_label"},
    "sst2": {"source": "sst2", "text_columns": "sentence", "label_column": "label"},
    "clinc150": {"source": "clinc150", "text_columns": "text", "label_column": "intent"},
    "stdlib-docs": {"source": "stdlib-docs"},
}
TRAIN_ROWS, HELD_OUT_ROWS, MAX_LENGTH = 1000, 1000, 64
EPOCHS, BATCH_SIZE = 3, 16
SEEDS = [0, 1]
RATES = [1e-4, 8e-4, 2e-4, 3e-5, 4e-4, 1e-5, 1.6e-3, 3e-3]  # in the order in which they are run
SWEEPS: dict[str, dict[str, Any]] = {
    "wide": {},
    "narrow": {"start_lr": 1e-6, "end_lr": 0.1},
    "lightning": {"start_lr": 1e-8, "end_lr": 1.0},
}


@dataclass(frozen=True)
class Case:
    """One start of training: what is trained on what, but not at which rate."""

    task: str
    seed: int
    discriminative: bool

    def key(self, kind: str, **more: Any) -> dict[str, Any]:
        """What names a result of this case."""
        return {"kind": kind, "task": self.task, "seed": self.seed, "discriminative": self.discriminative, **more}


class Results:
    """A JSONL file in which every result is found by its key; a half-written last line does not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = list(self._read())

    def _read(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue

    def find(self, **key: Any) -> list[dict[str, Any]]:
        return [line for line in self.lines if all(line.get(name) == value for name, value in key.items())]

    def add(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("\n" * self._needs_newline() + json.dumps(line) + "\n")
        self.lines.append(line)

    def _needs_newline(self) -> bool:
        return self.path.exists() and self.path.stat().st_size > 0 and not self.path.read_text().endswith("\n")


class Tasks:
    """The tokenised rows of each task, read once, and what trains on them."""

    def __init__(self, data_folder: Path, bf16: bool) -> None:
        self.data_folder = data_folder
        self.bf16 = bf16
        self.tokenizer = load_model_and_tokenizer(MODEL, label_names=["no", "yes"])[1]
        self._loaded: dict[str, Any] = {}

    def load(self, case: Case) -> tuple[Any, Any, list[str]]:
        """Training rows (drawn by the case's seed), held-out rows (the same for all), the names of the classes."""
        if case.task not in self._loaded:
            settings = dict(TASKS[case.task])
            source = settings.pop("source")
            local = source if source == "stdlib-docs" else str(self.data_folder / source)
            data = load_text_classification(local, **settings)
            rows = tokenize(data, self.tokenizer, max_length=MAX_LENGTH)
            held_out = [rows[name] for name in ("validation", "test") if name in rows]
            if len(held_out[0]) < HELD_OUT_ROWS:
                held_out = [concatenate_datasets(held_out)]
            chosen = stratified_rows(held_out[0]["labels"][:], HELD_OUT_ROWS, seed=0)
            self._loaded[case.task] = rows["train"], held_out[0].select(chosen), data.label_names
        train, held_out, label_names = self._loaded[case.task]
        return train.select(stratified_rows(train["labels"][:], TRAIN_ROWS, case.seed)), held_out, label_names


def stratified_rows(labels: list[int], rows: int, seed: int) -> list[int]:
    """So many rows (all, where there are fewer), each class in its share."""
    generator = np.random.default_rng(seed)
    classes = np.asarray(labels)
    place = np.empty(len(classes))
    for label in np.unique(classes):
        members = generator.permutation(np.flatnonzero(classes == label))
        place[members] = (np.arange(len(members)) + generator.random()) / len(members)
    return sorted(np.argsort(place, kind="stable")[:rows].tolist())


def make_trainer(case: Case, tasks: Tasks, folder: str, rate: float = 1e-4) -> ULMFiTTrainer:
    """A trainer at the start of its run: the head is drawn from the seed, and nothing is saved or logged."""
    train, held_out, label_names = tasks.load(case)
    set_seed(case.seed)
    model, _ = load_model_and_tokenizer(MODEL, label_names=label_names)
    args = ULMFiTTrainingArguments(
        output_dir=folder,
        learning_rate=rate,
        discriminative_factor=None if case.discriminative else 1.0,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=64,
        seed=case.seed,
        bf16=tasks.bf16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = ULMFiTTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tasks.tokenizer,
        data_collator=DataCollatorWithPadding(tasks.tokenizer),
        compute_metrics=lambda scored: {"accuracy": float((scored[0].argmax(-1) == scored[1]).mean())},
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def cases(tasks: list[str], seeds: list[int]) -> Iterator[Case]:
    """The tasks vary fastest, so that a part of the results is balanced over them."""
    for seed in seeds:
        for discriminative in (False, True):
            for task in tasks:
                yield Case(task, seed, discriminative)


def run_curves(results: Results, tasks: Tasks, options: argparse.Namespace) -> None:
    """Real training at every rate from every start."""
    jobs = [
        (case, rate)
        for seed in options.seeds
        for discriminative in (False, True)
        for rate in options.rates
        for case in cases(options.tasks, [seed])
        if case.discriminative == discriminative
    ]
    for number, (case, rate) in enumerate(jobs, 1):
        key = case.key("curve", rate=rate)
        if results.find(**key):
            continue
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(case, tasks, folder, rate)
            trained = trainer.train()
            scores = trainer.evaluate()
        results.add(
            key
            | {
                "accuracy": scores["eval_accuracy"],
                "loss": scores["eval_loss"],
                "train_loss": trained.training_loss,
                "bf16": tasks.bf16,
                "steps": trained.global_step,
                "seconds": round(time.monotonic() - start, 1),
            }
        )
        print(f"{number}/{len(jobs)} {json.dumps(results.lines[-1])}", flush=True)


def run_sweeps(results: Results, tasks: Tasks, options: argparse.Namespace) -> None:
    """Range tests of every design from every start."""
    for case in cases(options.tasks, options.seeds):
        for name, settings in SWEEPS.items():
            key = case.key("sweep", sweep=name)
            if results.find(**key):
                continue
            with tempfile.TemporaryDirectory() as folder:
                trainer = make_trainer(case, tasks, folder)
                curve = lr_range_test(trainer, **settings)
            results.add(
                key
                | {
                    "bf16": tasks.bf16,
                    "rates": curve.rates,
                    "losses": curve.losses,
                    "start_loss": curve.start_loss,
                    "stopped": curve.stopped,
                    "meta": curve.meta,
                }
            )
            print(case, name, len(curve.rates), curve.stopped, curve.meta, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["curves", "sweeps"])
    parser.add_argument("--results", type=Path, default=Path("runs/lr_suggestions.jsonl"))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ULMFIT_TOOLS_DATA", "../shared/data")))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--bf16", action="store_true", help="mixed precision, where the machine is faster with it")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch computes with")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    command = {"curves": run_curves, "sweeps": run_sweeps}[options.command]
    command(Results(options.results), Tasks(options.data, options.bf16), options)


if __name__ == "__main__":
    main()
