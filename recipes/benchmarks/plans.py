"""Shipped plans side by side on one dataset: test accuracy over seeds, wall time, optimizer steps.

    python recipes/benchmarks/plans.py --dataset ../shared/data/trec --label_column coarse_label

A plan may name a rate, so that a baseline can be tuned on the validation column: --plans baseline@5e-5 baseline@1e-4.
Runs lie in --output_dir, one folder each, and are resumed or taken over when the command is given again. For each seed
the plans run in turn, so a machine that grows slower meanwhile slows all of them; times are of training, medians.
"""

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ulmfit_tools import load_text_classification, run_plan
from ulmfit_tools.data import TextClassificationData

MODEL = "minilm"
PLANS = ["baseline", "chain_thaw", "gradual_unfreezing", "fastai_eight_steps"]
SEEDS = [1, 2, 3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--text_column")
    parser.add_argument("--label_column")
    parser.add_argument("--max_length", type=int)
    parser.add_argument("--train_rows", type=int, help="train on so many rows, each class in its share; default: all")
    parser.add_argument("--plans", nargs="+", default=PLANS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--output_dir", default="runs/benchmarks/plans")
    parser.add_argument("--bf16", action="store_true", help="mixed precision, where the machine is faster with it")
    flags = parser.parse_args()
    precision = {"bf16": True, "use_cpu": not torch.cuda.is_available()} if flags.bf16 else {}
    results: dict[str, list] = {name: [] for name in flags.plans}
    for seed in flags.seeds:
        data = load_text_classification(
            flags.dataset, text_columns=flags.text_column, label_column=flags.label_column, seed=seed
        )
        if flags.train_rows is not None:
            data = with_fewer_rows(data, flags.train_rows, seed)
        for name in flags.plans:
            plan, _, rate = name.partition("@")
            folder = Path(plan).stem + (f"@{rate}" if rate else "")
            results[name].append(
                run_plan(
                    plan,
                    model=flags.model,
                    data=data,
                    output_dir=Path(flags.output_dir) / Path(flags.dataset).name / f"{folder}-{seed}",
                    max_length=flags.max_length,
                    seed=seed,
                    resume=True,
                    **({"learning_rate": float(rate)} if rate else {}),
                    **precision,
                    disable_tqdm=not sys.stderr.isatty(),
                )
            )
            print_table(results, flags.dataset)


def with_fewer_rows(data: TextClassificationData, rows: int, seed: int) -> TextClassificationData:
    """The same data with a part of its training rows."""
    train = data.splits["train"].train_test_split(train_size=rows, stratify_by_column="labels", seed=seed)["train"]
    splits = type(data.splits)({**data.splits, "train": train})
    return dataclasses.replace(data, splits=splits, fingerprint=f"{data.fingerprint}-{rows}-{seed}")


def print_table(results: dict[str, list], dataset: str) -> None:
    table = Table(title=f"{dataset}: test split, seeds in the order given")
    for column in ("plan", "validation", "test", "each seed", "F1 macro", "median time", "steps"):
        table.add_column(column, justify="left" if column == "plan" else "right")
    for name, runs in results.items():
        if runs:
            accuracies = [run.metrics["test"]["accuracy"] for run in runs]
            table.add_row(
                name,
                f"{statistics.mean(run.metrics['validation']['accuracy'] for run in runs):.4f}",
                f"{statistics.mean(accuracies):.4f}",
                " ".join(f"{value:.4f}" for value in accuracies),
                f"{statistics.mean(run.metrics['test']['f1_macro'] for run in runs):.4f}",
                f"{statistics.median(run.seconds for run in runs):.0f} s",
                f"{statistics.mean(sum(phase.steps for phase in run.phases) for run in runs):.0f}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
