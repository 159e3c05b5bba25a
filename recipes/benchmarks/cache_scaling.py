"""What precomputed activations cost as the rows grow: time of the pass, time of a step, and memory that is not files.

    python recipes/benchmarks/cache_scaling.py

Every size runs in a process of its own, on a small BERT built from its config, so that the store weighs more than the
model. Memory is what the process cannot give back, `RssAnon` in /proc/self/status (Linux): pages of the cache that lie
in memory belong to the files, and the system takes them back when it needs the room. Costs are linear when the columns
for a row are level, and memory is flat when its growth stays far below the size of the cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from datasets import Dataset, load_from_disk
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification, DefaultDataCollator, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

from ulmfit_tools import freeze_to, precomputed

ROWS = [1_000, 10_000, 100_000]
TOKENS, WIDTH, LABELS, VOCABULARY = 24, 384, 4, 1_000
BATCH_SIZE, STEPS = 32, 200


def anonymous_memory() -> float:
    """Memory of this process that no file stands behind, in MiB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")) / 1024


class Peak(TrainerCallback):
    """The most memory after any step."""

    mebibytes = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.mebibytes = max(self.mebibytes, anonymous_memory())


def write_rows(rows: int, folder: str) -> None:
    """Random texts of one length, on the disk, as `datasets` keeps them."""
    generator = np.random.default_rng(0)
    ids = generator.integers(5, VOCABULARY, (rows, TOKENS))
    columns = {"input_ids": list(ids), "attention_mask": list(np.ones_like(ids)), "labels": ids[:, 0] % LABELS}
    Dataset.from_dict(columns).save_to_disk(folder)


def measure(rows: int, folder: str, steps: int) -> dict[str, float]:
    """One size: half of the layers frozen, so that a vector is kept for each token."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=64,
        max_position_embeddings=TOKENS,
        num_labels=LABELS,
    )
    model = BertForSequenceClassification(config)
    freeze_to(model, -2)
    common = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    args = Arguments(
        f"{folder}/run",
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=steps,
        dataloader_pin_memory=False,
        **common,
    )
    peak = Peak()
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=load_from_disk(f"{folder}/rows"),
        data_collator=DefaultDataCollator(),
        callbacks=[peak],
    )
    before = anonymous_memory()
    with precomputed(trainer, cache_dir=f"{folder}/cache") as report:
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return {
        "build": report.seconds,
        "step": seconds / steps,
        "growth": peak.mebibytes - before,
        "cache": report.nbytes / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # rows and folder: this process measures one size
    flags = parser.parse_args()
    if flags.one:
        print(json.dumps(measure(int(flags.one[0]), flags.one[1], flags.steps)))
        return
    table = Table(title=f"{TOKENS} tokens of {WIDTH} numbers a row, batches of {BATCH_SIZE}")
    for column in ("rows", "cache", "pass", "pass, a 1,000 rows", "a step", "memory grows by"):
        table.add_column(column, justify="right")
    for rows in flags.rows:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(rows, f"{folder}/rows")
            command = [sys.executable, __file__, "--steps", str(flags.steps), "--one", str(rows), folder]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(printed.splitlines()[-1])
        table.add_row(
            f"{rows:,}",
            f"{found['cache']:,.0f} MiB",
            f"{found['build']:.1f} s",
            f"{1000 * found['build'] / rows:.2f} s",
            f"{1000 * found['step']:.1f} ms",
            f"{found['growth']:,.0f} MiB",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
