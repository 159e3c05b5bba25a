"""How good are the rates that learning-rate finders suggest? The true curves, the suggestions, and their regret.

    python recipes/benchmarks/lr_suggestions.py curves     # accuracy after real training at each of 8 rates: hours
    python recipes/benchmarks/lr_suggestions.py sweeps     # range tests on the same runs' starts
    python recipes/benchmarks/lr_suggestions.py table      # what each suggestion would have cost

With `--trained_head` all three start from a head that was trained alone for an epoch, much as after a plan's first
phase.
What the README states is the table of `--results recipes/benchmarks/results/lr_suggestions.jsonl`, without the hours.
Every result is a line in the results file as soon as it is there; a command that was stopped goes on where it was.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets, disable_progress_bars
from transformers import DataCollatorWithPadding, PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from ulmfit_tools import freeze_to
from ulmfit_tools.data import load_model_and_tokenizer, load_text_classification, tokenize
from ulmfit_tools.lr_curve import READINGS, LRCurve, valley_index
from ulmfit_tools.lr_range import lr_range_test
from ulmfit_tools.trainer import ULMFiTTrainer, ULMFiTTrainingArguments

MODEL, LAYERS = "minilm", 6
TASKS: dict[str, dict[str, Any]] = {
    "trec": {"source": "trec", "text_columns": "text", "label_column": "coarse_label"},
    "sst2": {"source": "sst2", "text_columns": "sentence", "label_column": "label"},
    "clinc150": {"source": "clinc150", "text_columns": "text", "label_column": "intent"},
    "stdlib-docs": {"source": "stdlib-docs"},
    "trec-fine": {"source": "trec", "text_columns": "text", "label_column": "fine_label"},
}
MADE_ON = ["trec", "sst2", "clinc150", "stdlib-docs"]  # the tasks of the table; our rule was chosen on trec-fine, too
TRAIN_ROWS, HELD_OUT_ROWS, MAX_LENGTH = 1000, 4000, 64  # with 1,000 rows chance moves the best of 8 by most of a point
EPOCHS, BATCH_SIZE = 3, 16
HEAD_RATE = 1e-3
SEEDS = [0, 1]
RATES = [2e-4, 4e-4, 8e-4, 1e-4, 1.6e-3, 3e-3, 3e-5, 1e-5]  # in the order in which they are run
SWEEPS: dict[str, dict[str, Any]] = {
    "ours": {"confirm": True},  # 1e-7 to 10 in 100 steps: also what fastai and torch-lr-finder do by default
    "lightning": {"start_lr": 1e-8, "end_lr": 1.0},
}
HABITS = [5e-5, 2e-5]
CONFIRMED = "ours, confirmed"


@dataclass(frozen=True)
class Case:
    """One start of training: what is trained on what, but not at which rate."""

    task: str
    seed: int
    discriminative: bool
    trained_head: bool = False
    layers: int = LAYERS

    def key(self, kind: str, **more: Any) -> dict[str, Any]:
        """What names a result of this case."""
        return {"kind": kind, **asdict(self), **more}

    def __str__(self) -> str:
        return f"{self.task}, seed {self.seed}" + ", discriminative" * self.discriminative


class Results:
    """A JSONL file in which every result is found by its key; a half-written last line does not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = list(self._read())

    def _read(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    yield {"trained_head": False, "layers": LAYERS, **json.loads(line)}
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
        self.trained_heads: dict[Case, dict[str, torch.Tensor]] = {}
        self._loaded: dict[str, Any] = {}

    def load(self, case: Case) -> tuple[Any, Any, list[str]]:
        """Training rows (drawn by the case's seed), held-out ones (of all the others), the names of the classes."""
        if case.task not in self._loaded:
            settings = dict(TASKS[case.task])
            source = settings.pop("source")
            local = source if source == "stdlib-docs" else str(self.data_folder / source)
            data = load_text_classification(local, **settings)
            rows = tokenize(data, self.tokenizer, max_length=MAX_LENGTH)
            others = [rows[name] for name in ("validation", "test") if name in rows]
            self._loaded[case.task] = rows["train"], concatenate_datasets(others), data.label_names
        train, others, label_names = self._loaded[case.task]
        chosen = stratified_rows(train["labels"][:], TRAIN_ROWS, case.seed)
        left = concatenate_datasets([train.select(sorted(set(range(len(train))) - set(chosen))), others])
        lengths = [len(ids) for ids in left["input_ids"][:]]
        held_out = sorted(stratified_rows(left["labels"][:], HELD_OUT_ROWS, seed=0), key=lengths.__getitem__)
        return train.select(chosen), left.select(held_out), label_names


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
    """A trainer at the start of its run: the head is drawn from the seed, or trained alone from there."""
    if case.trained_head and case not in tasks.trained_heads:
        head_trainer = new_trainer(case, tasks, folder, HEAD_RATE, epochs=1)
        freeze_to(head_trainer.model, -1)
        head_trainer.train()
        tasks.trained_heads[case] = head_trainer.model.state_dict()
    trainer = new_trainer(case, tasks, folder, rate, epochs=EPOCHS)
    if case.trained_head:
        trainer.model.load_state_dict(tasks.trained_heads[case])
    return trainer


def new_trainer(case: Case, tasks: Tasks, folder: str, rate: float, epochs: int) -> ULMFiTTrainer:
    """A trainer of the pretrained model that saves and logs nothing."""
    train, held_out, label_names = tasks.load(case)
    set_seed(case.seed)
    model, _ = load_model_and_tokenizer(MODEL, label_names=label_names)
    encoder: Any = model.base_model.encoder
    encoder.layer = encoder.layer[: case.layers]
    args = ULMFiTTrainingArguments(
        output_dir=folder,
        learning_rate=rate,
        discriminative_factor=None if case.discriminative else 1.0,
        num_train_epochs=epochs,
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


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The tasks vary fastest, so that a part of the results is balanced over them."""
    for seed in options.seeds:
        for discriminative in (False, True):
            for task in options.tasks:
                yield Case(task, seed, discriminative, options.trained_head, options.layers)


def run_curves(results: Results, tasks: Tasks, options: argparse.Namespace) -> None:
    """Real training at every rate from every start."""
    jobs = [
        (case, rate)
        for seed in options.seeds
        for discriminative in (False, True)
        for rate in options.rates
        for case in cases(options)
        if (case.seed, case.discriminative) == (seed, discriminative)
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
                "held_out": HELD_OUT_ROWS,
                "bf16": tasks.bf16,
                "steps": trained.global_step,
                "seconds": round(time.monotonic() - start, 1),
            }
        )
        print(f"{number}/{len(jobs)} {json.dumps(results.lines[-1])}", flush=True)


def run_sweeps(results: Results, tasks: Tasks, options: argparse.Namespace) -> None:
    """Range tests of every design from every start."""
    for case in cases(options):
        for name, settings in SWEEPS.items():
            key = case.key("sweep", sweep=name)
            if results.find(**key):
                continue
            with tempfile.TemporaryDirectory() as folder:
                curve = lr_range_test(make_trainer(case, tasks, folder), **settings)
            results.add(key | {"bf16": tasks.bf16, "curve": json.loads(curve.to_json())})
            rates = {reading: f"{rate:.1e}" for reading, rate in curve.suggestions.items()}
            print(f"{case} {name}: {rates} {curve.confidence}, {curve.seconds:.0f} s", flush=True)


# The rules of others, from their definitions, on curves that were swept with their settings. They pair a loss with the
# rate of the update after it, so the loss before the first update belongs to the first rate.


def averaged(curve: LRCurve, beta: float) -> np.ndarray:
    """The losses as they smooth them: an exponential moving average, corrected for its bias."""
    losses = np.array([curve.start_loss, *curve.losses[:-1]])
    total, averages = 0.0, []
    for count, loss in enumerate(losses, 1):
        total = beta * total + (1 - beta) * loss
        averages.append(total / (1 - beta**count))
    return np.array(averages)


def torch_lr_finder(curve: LRCurve) -> float:
    """`LRFinder.plot`, steepest: the first loss as it is, then 0.05 of each new one; 10 points and 5 are left out."""
    smooth = [curve.start_loss]
    for loss in curve.losses[:-1]:
        smooth.append(0.05 * loss + 0.95 * smooth[-1])
    return curve.rates[10 + int(np.gradient(smooth[10:-5]).argmin())]


def lightning(curve: LRCurve) -> float:
    """`_LRFinder.suggestion`: steepest, with a beta of 0.98; 10 points and 1 are left out."""
    return curve.rates[10 + int(np.gradient(averaged(curve, 0.98)[10:-1]).argmin())]


def fastai_valley(curve: LRCurve) -> float:
    """`valley`, with a beta of 0.98; 10 points and 5 are left out."""
    return curve.rates[10 + valley_index(averaged(curve, 0.98)[10:-5].tolist())]


def fastai_minimum(curve: LRCurve) -> float:
    """`minimum`, with a beta of 0.98: a tenth of the rate with the lowest loss."""
    return curve.rates[10 + int(averaged(curve, 0.98)[10:-5].argmin())] / 10


def random_walk(curve: LRCurve) -> float:
    """The rate at which the whole training goes as far, as a random walk, as the sweep went up to its turn.

    Our first rule. One step of Adam moves each weight by about the rate, so a run with rates r_t goes as far as
    `sqrt(sum r_t ** 2)`; under a schedule that rises to its peak and falls to 0 in straight lines, T steps sum to
    `peak ** 2 * T / 3`.
    """
    until = np.array(curve.rates[: curve.turn + 1])
    peak = math.sqrt(3 * float(until @ until) / curve.training_steps) / curve.rate_share
    return min(peak, curve.rates[curve.turn])


def contestants() -> dict[str, tuple[str | None, Callable[[LRCurve], float], Callable[[LRCurve], int]]]:
    """By name: the sweep that a rule reads, the rule, and the optimizer steps that it costs."""

    def without_probes(curve: LRCurve) -> LRCurve:
        return replace(curve, probes=())

    def swept(curve: LRCurve) -> int:
        return len(curve.rates) + (curve.loss_on == "training")

    ours: dict[str, Any] = {
        "ours, default": ("ours", lambda curve: without_probes(curve).suggestion, swept),
        CONFIRMED: ("ours", lambda curve: curve.suggestion, lambda curve: curve.steps),
    }
    for name, rule in {"random walk to the turn": random_walk, **READINGS}.items():
        ours[f"  our curve, {name}"] = ("ours", rule, swept)
    peers = {
        "torch-lr-finder, steepest": ("ours", torch_lr_finder, swept),
        "Lightning, steepest": ("lightning", lightning, swept),
        "fastai, valley": ("ours", fastai_valley, swept),
        "fastai, minimum/10": ("ours", fastai_minimum, swept),
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
        if set(options.rates) <= set(points) and set(SWEEPS) <= set(sweeps):
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
    averaged_over_seeds = {case: mean_points(complete, case) for case in complete}
    start = "after a head trained alone" if options.trained_head else "with a new head"
    start += f", {options.layers} layers" * (options.layers != LAYERS)
    print(f"{len(complete)} starts (task, seed, discriminative or not) {start}\n")
    print("| rule | mean regret | worst | averaged: mean | worst | worst on | rates | steps |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (sweep, rule, cost) in contestants().items():
        if name == CONFIRMED and not all(curves["ours"].probes for _, curves in complete.values()):
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
    print_other_seeds(complete)
    print("\nBest accuracies:")
    for case, (points, _) in complete.items():
        rate = max(points, key=lambda rate: points[rate])
        print(f"  {case}: {points[rate]:.3f} at {rate:g}")


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
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=MADE_ON)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="for the table: at least these")
    parser.add_argument("--trained_head", action="store_true", help="start from a head that was trained alone")
    parser.add_argument("--layers", type=int, default=LAYERS, help="only the first so many: another model")
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
    run(results, Tasks(options.data, options.bf16), options)


if __name__ == "__main__":
    main()
