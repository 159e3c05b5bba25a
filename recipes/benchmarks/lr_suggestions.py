"""How good are the rates that learning-rate finders suggest? The true curves, the suggestions, and their regret.

    python recipes/benchmarks/lr_suggestions.py curves     # accuracy after real training at each of 8 rates: hours
    python recipes/benchmarks/lr_suggestions.py sweeps     # range tests on the same runs' starts
    python recipes/benchmarks/lr_suggestions.py table      # what each suggestion would have cost

With `--trained_head` all three start from a head that was trained alone for an epoch, much as after a plan's first
phase; with `--mixed 28` from so many starts that were drawn at random: other data, lengths, batches and models.
README.md here tells the figures: `table --results recipes/benchmarks/results/lr_suggestions.jsonl`, without the hours.
Every result is a line in the results file as soon as it is there; a command that was stopped goes on where it was.
"""

import argparse
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lr_rules
import numpy as np
import torch
from datasets import disable_progress_bars
from lr_starts import LAYERS, MODEL, TASKS, TRAIN_ROWS, Case, Tasks, make_trainer, mixed_cases
from transformers.utils import logging as transformers_logging

from ulmfit_tools.lr_curve import GRADES, LRCurve
from ulmfit_tools.lr_range import lr_range_test
from ulmfit_tools.lr_readings import READINGS

MADE_ON = ["trec", "sst2", "clinc150", "stdlib-docs"]  # the tasks of the table; our rule was chosen on trec-fine, too
HELD_OUT_ROWS = 4000  # with 1,000 rows chance moves the best of 8 by most of a point
SEEDS = [0, 1]
MIXED_RATES = [4e-4, 2e-4, 8e-4, 1e-4, 1.6e-3]  # and twice or half as much while the best is at an end
RATES = [2e-4, 4e-4, 8e-4, 1e-4, 1.6e-3, 3e-3, 3e-5, 1e-5]  # in the order in which they are run
SWEEPS: dict[str, dict[str, Any]] = {
    "ours": {},  # 1e-7 to 10 in 100 steps: also what fastai and torch-lr-finder do by default
    "three": {"num_sweeps": 3},
    "confirmed": {"confirm": True},
    "lightning": {"start_lr": 1e-8, "end_lr": 1.0},
}
HABITS = [5e-5, 2e-5]


class Results:
    """A JSONL file in which every result is found by its key; a half-written last line does not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = list(self._read())

    def _read(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    yield asdict(Case("", 0, False)) | json.loads(line)
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


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The tasks vary fastest, so that a part of the results is balanced over them."""
    drawn = itertools.islice(mixed_cases(), options.skip, options.mixed)
    for case in drawn if options.mixed else chosen_cases(options):
        yield replace(case, model=Path(options.model).name)


def chosen_cases(options: argparse.Namespace) -> Iterator[Case]:
    """The starts of the tasks, seeds and kinds that the command line names."""
    for seed in options.seeds:
        for discriminative in (False, True):
            for task in options.tasks:
                yield Case(task, seed, discriminative, options.trained_head, options.layers, options.train_rows)


def run_curves(results: Results, tasks: Tasks, options: argparse.Namespace) -> None:
    """Real training at every rate from every start."""
    if options.mixed:
        for case in cases(options):
            for rate in MIXED_RATES:
                run_one(results, tasks, case, rate)
            while (rate := rate_beyond(results, case)) is not None:
                run_one(results, tasks, case, rate)
    else:
        for seed in options.seeds:
            for discriminative in (False, True):
                for rate in options.rates:
                    for case in cases(options):
                        if (case.seed, case.discriminative) == (seed, discriminative):
                            run_one(results, tasks, case, rate)
    if options.refine:
        for case in cases(options):
            while (rate := rate_beside(results, case)) is not None:
                run_one(results, tasks, case, rate)


def run_one(results: Results, tasks: Tasks, case: Case, rate: float) -> None:
    """One training, if its result is not there yet."""
    key = case.key("curve", rate=rate)
    if results.find(**key):
        return
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
            "held_out": tasks.held_out_rows,
            "bf16": tasks.bf16,
            "steps": trained.global_step,
            "seconds": round(time.monotonic() - start, 1),
        }
    )
    print(json.dumps(results.lines[-1]), flush=True)


def rate_beyond(results: Results, case: Case) -> float | None:
    """Twice the highest rate or half the lowest, where that is the best so far and 1e-5 to 1e-2 is not left."""
    points = {line["rate"]: line["accuracy"] for line in results.find(**case.key("curve"))}
    best = max(points, key=lambda rate: points[rate])
    if best == max(points) and best < 1e-2:
        return 2 * best
    return best / 2 if best == min(points) and best > 1e-5 else None


def rate_beside(results: Results, case: Case) -> float | None:
    """Half-way from the best rate so far to a neighbour that is more than a factor of 1.5 away.

    A straight line between two rates of a curve with a sharp top lies points below it.
    """
    points = {line["rate"]: line["accuracy"] for line in results.find(**case.key("curve"))}
    rates = sorted(points)
    best = rates.index(max(rates, key=points.__getitem__))
    for low, high in itertools.pairwise(rates[max(best - 1, 0) : best + 2]):
        if high / low > 1.5:
            return float(f"{math.sqrt(low * high):.3g}")
    return None


def run_sweeps(results: Results, tasks: Tasks, options: argparse.Namespace) -> None:
    """Range tests of every design from every start."""
    for case in cases(options):
        for name in options.sweeps:
            key = case.key("sweep", sweep=name)
            if results.find(**key):
                continue
            with tempfile.TemporaryDirectory() as folder:
                curve = lr_range_test(make_trainer(case, tasks, folder), **SWEEPS[name])
            results.add(key | {"bf16": tasks.bf16, "curve": json.loads(curve.to_json())})
            rates = {reading: f"{rate:.1e}" for reading, rate in curve.suggestions.items()}
            print(f"{case} {name}: {rates} {curve.confidence}, {curve.seconds:.0f} s", flush=True)


def contestants() -> dict[str, tuple[str | None, Callable[[LRCurve], float], Callable[[LRCurve], int]]]:
    """By name: the sweep that a rule reads, the rule, and the optimizer steps that it costs."""

    def swept(curve: LRCurve) -> int:
        return len(curve.rates) + (curve.loss_on == "training")

    ours: dict[str, Any] = {
        "ours, default": ("ours", lambda curve: curve.suggestion, swept),
        "ours, three sweeps": ("three", lambda curve: curve.suggestion, lambda curve: curve.steps),
        "ours, confirmed": ("confirmed", lambda curve: curve.suggestion, lambda curve: curve.steps),
    }
    for name, rule in READINGS.items():
        ours[f"  our curve, {name}"] = ("ours", rule, swept)
    peers = {
        "torch-lr-finder, steepest": ("ours", lr_rules.torch_lr_finder, swept),
        "Lightning, steepest": ("lightning", lr_rules.lightning, swept),
        "fastai, valley": ("ours", lr_rules.fastai_valley, swept),
        "fastai, minimum/10": ("ours", lr_rules.fastai_minimum, swept),
    }
    habits = {f"always {rate:g}": (None, lambda curve, rate=rate: rate, lambda curve: 0) for rate in HABITS}
    return ours | peers | habits


def regret(points: list[tuple[float, float]], rate: float) -> float:
    """The best accuracy on a true curve less that at a rate, between two points by the logarithm of the rate."""
    rates, accuracies = zip(*sorted(points), strict=True)
    return max(accuracies) - float(np.interp(math.log(rate), np.log(rates), accuracies))


def complete_cases(results: Results, options: argparse.Namespace) -> dict[Case, tuple[dict, dict[str, LRCurve]]]:
    """The starts whose rates and sweeps are all there: the accuracy at each rate, and the sweeps by name."""
    complete = {}
    for case in cases(options):
        points = {line["rate"]: line["accuracy"] for line in results.find(**case.key("curve"))}
        sweeps = {line["sweep"]: line["curve"] for line in results.find(**case.key("sweep"))}
        if set(MIXED_RATES if options.mixed else options.rates) <= set(points) and "ours" in sweeps:
            curves = {name: LRCurve.from_json(json.dumps(values)) for name, values in sweeps.items()}
            complete[case] = points, curves
    return complete


def mean_points(complete: dict[Case, tuple[dict, dict[str, LRCurve]]], case: Case) -> list[tuple[float, float]]:
    """The true curve of a task, averaged over the seeds, for the best of noisy accuracies is a mark too high."""
    alike = [points for other, (points, _) in complete.items() if replace(other, seed=case.seed) == case]
    shared = set.intersection(*map(set, alike))
    return [(rate, float(np.mean([points[rate] for points in alike]))) for rate in sorted(shared)]


def print_table(results: Results, options: argparse.Namespace) -> None:
    """Mean and worst regret of every rule, in points; on the curve of each start and on those averaged over seeds."""
    complete = complete_cases(results, options)
    if not complete:
        raise SystemExit(f"No start in {options.results} has all of its rates and sweeps yet")
    start = "after a head trained alone" if options.trained_head else "with a new head"
    start = "drawn at random" if options.mixed else start + f", {options.layers} layers" * (options.layers != LAYERS)
    start += f", {options.train_rows} rows" * (options.train_rows != TRAIN_ROWS)
    start += f", {Path(options.model).name}" * (options.model != MODEL)
    print(f"{len(complete)} starts (task, seed, discriminative or not) {start}\n")
    print_rules(complete)
    print_by_confidence(complete)
    print_other_seeds(complete)
    print("\nBest accuracies:")
    for case, (points, _) in complete.items():
        rate = max(points, key=lambda rate: points[rate])
        print(f"  {case}: {points[rate]:.3f} at {rate:g}")


def print_rules(complete: dict[Case, tuple[dict, dict[str, LRCurve]]]) -> None:
    """A row for each rule whose sweeps are all there."""
    averaged_over_seeds = {case: mean_points(complete, case) for case in complete}
    print("| rule | mean regret | worst | averaged: mean | worst | worst on | rates | steps |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (sweep, rule, cost) in contestants().items():
        if not all((sweep or "ours") in curves for _, curves in complete.values()):
            continue
        chosen = {case: rule(curves[sweep or "ours"]) for case, (_, curves) in complete.items()}
        steps = [cost(curves[sweep or "ours"]) for _, curves in complete.values()]
        own = {case: 100 * regret([*complete[case][0].items()], rate) for case, rate in chosen.items()}
        mean = {case: 100 * regret(averaged_over_seeds[case], rate) for case, rate in chosen.items()}
        worst = max(own, key=lambda case: own[case])
        beyond = any(not min(complete[case][0]) <= rate <= max(complete[case][0]) for case, rate in chosen.items())
        cells = [
            f"{name}{' (*)' * beyond}",
            f"{np.mean([*own.values()]):.2f}",
            f"{own[worst]:.2f}",
            f"{np.mean([*mean.values()]):.2f}",
            f"{max(mean.values()):.2f}",
            str(worst),
            f"{min(chosen.values()):.1e} to {max(chosen.values()):.1e}",
            f"{np.mean(steps):.0f}",
        ]
        print(f"| {' | '.join(cells)} |")
    print(
        "\n(*) Some of its rates lie beyond the measured ones, and count as the nearest of these: too well, as a rule."
    )


def print_by_confidence(complete: dict[Case, tuple[dict, dict[str, LRCurve]]]) -> None:
    """Whether our default is better where it says that it is sure."""
    print("\nOurs, default, by what it says of itself:")
    for grade in reversed(GRADES):
        own = [(points, curves["ours"]) for points, curves in complete.values() if curves["ours"].confidence == grade]
        found = [100 * regret([*points.items()], curve.suggestion) for points, curve in own]
        if found:
            print(f"  {grade} confidence, {len(found)}: mean regret {np.mean(found):.2f}, worst {max(found):.2f}")


def print_other_seeds(complete: dict[Case, tuple[dict, dict[str, LRCurve]]]) -> None:
    """What the best of all rates by real training costs when the seed is another one: how far a search can get."""
    regrets, trainings = [], []
    for case, (points, _) in complete.items():
        for other, (tried, _) in complete.items():
            if other != case and replace(other, seed=case.seed) == case:
                regrets.append(100 * regret([*points.items()], max(tried, key=lambda rate: tried[rate])))
                trainings.append(len(tried))
    if regrets:
        print(
            f"\nThe best rate of another seed's whole curve ({np.mean(trainings):.0f} trainings): "
            f"mean regret {np.mean(regrets):.2f}, worst {max(regrets):.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["curves", "sweeps", "table"])
    parser.add_argument("--results", type=Path, default=Path("runs/lr_suggestions.jsonl"))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ULMFIT_TOOLS_DATA", "../shared/data")))
    parser.add_argument("--tasks", nargs="+", default=MADE_ON, help=f"{', '.join(TASKS)}, or a CSV file in --data")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="for the table: at least these")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="only these")
    parser.add_argument("--trained_head", action="store_true", help="start from a head that was trained alone")
    parser.add_argument("--refine", action="store_true", help="curves: also half-way to the neighbours of the best")
    parser.add_argument("--layers", type=int, default=LAYERS, help="only the first so many: another model")
    parser.add_argument("--train_rows", type=int, default=TRAIN_ROWS)
    parser.add_argument("--model", default=MODEL, help="another model, a folder or a name on the Hub; see --layers")
    parser.add_argument("--mixed", type=int, metavar="N", help="instead of tasks and seeds: N starts drawn at random")
    parser.add_argument("--skip", type=int, default=0, help="so many of those drawn at random, from the first")
    parser.add_argument("--held_out_rows", type=int, default=HELD_OUT_ROWS)
    parser.add_argument("--bf16", action="store_true", help="mixed precision, where the machine is faster with it")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch computes with")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    results = Results(options.results)
    if options.command == "table":
        print_table(results, options)
        return
    run = run_curves if options.command == "curves" else run_sweeps
    run(results, Tasks(options.data, options.bf16, options.held_out_rows, options.model), options)


if __name__ == "__main__":
    main()
