"""Tables in the terminal: groups and rates, data, the result of a run, scores and predictions."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from ulmfit_tools.data import TextClassificationData
from ulmfit_tools.inference import Evaluation, Prediction
from ulmfit_tools.layers import LayerGroups
from ulmfit_tools.plans import PhaseResult, PlanResult


def print_groups(model: PreTrainedModel, groups: LayerGroups, rates: Sequence[float]) -> None:
    """Layer groups from input to output: modules, parameters, share of all parameters, learning rate."""
    sizes = [sum(p.numel() for p in group.parameters(model)) for group in groups]
    table = Table(title=f"{len(groups)} layer groups of {type(model).__name__}, input to output")
    for name, justify in [("", "right"), ("group", "left"), ("modules", "left")]:
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for name in ("parameters", "share", "rate"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, (group, size, rate) in enumerate(zip(groups, sizes, rates, strict=True)):
        share = f"{size / sum(sizes):.1%}"
        table.add_row(str(i), group.name, _modules(group.module_names), f"{size:,}", share, f"{rate:.2e}")
    table.add_section()
    table.add_row("", "all", "", f"{sum(sizes):,}", "100.0%", "")
    _console().print(table)


def _modules(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]}, ... {names[-1]} ({len(names)} modules)"


def print_data(data: TextClassificationData) -> None:
    """Splits with their sizes, labels, and what was decided for the user."""
    sizes = ", ".join(f"{name} {len(split):,}" for name, split in data.splits.items())
    labels = ", ".join(data.label_names[:8]) + (", ..." if len(data.label_names) > 8 else "")
    console = _console()
    summary = f": {sizes} rows; {len(data.label_names)} labels: {labels}"
    console.print(Text.assemble((data.source, "bold"), summary), soft_wrap=True)
    print_notes(data.notes)


def print_notes(notes: Sequence[str]) -> None:
    """What was decided for the user, a line each."""
    for note in notes:
        _console().print(f"  {note}", style="dim", soft_wrap=True)


def print_result(result: PlanResult, data: TextClassificationData) -> None:
    """The phases of a run, its final scores beside what a trivial classifier reaches, and where the model lies."""
    table = Table(title=f"Plan '{result.plan}'")
    for name in ("phase", "trains"):
        table.add_column(name, overflow="fold")  # they alone give way: the others leave them room in 80 columns
    for name in ("rate", "epochs", "steps", "time", "val.\nloss", "val.\naccuracy"):
        table.add_column(name, justify="right", no_wrap=True)
    for phase in result.phases:
        table.add_row(*_phase_row(phase))
    console = _console()
    console.print(table)
    if result.metrics:  # there are none where nothing was held out
        console.print(_scores(result, data))
    console.print(f"The model is in {result.output_dir} ({result.seconds:.0f} s of training).", soft_wrap=True)


def _scores(result: PlanResult, data: TextClassificationData) -> Table:
    scores = Table(title="Result")
    scores.add_column("split")
    for name in ("accuracy", "F1 macro", "F1 weighted", "MCC"):
        scores.add_column(name, justify="right")
    for split, metrics in result.metrics.items():
        values = [metrics.get(key) for key in ("accuracy", "f1_macro", "f1_weighted", "mcc")]
        scores.add_row(split, *["" if value is None else f"{value:.4f}" for value in values])
    for name, accuracy in _references(list(result.metrics), data).items():
        scores.add_row(name, f"{accuracy:.4f}", "", "", "", style="dim")
    return scores


def _references(splits: Sequence[str], data: TextClassificationData) -> dict[str, float]:
    """Accuracy of simpler classifiers: the commonest training label always; on the embedded data TF-IDF with logistic
    regression.
    """
    labels = {name: np.asarray(data.splits[name]["labels"]) for name in ("train", *splits)}
    commonest = int(np.bincount(labels["train"]).argmax())
    label = data.label_names[commonest]
    found = {f"{name}, always '{label}'": float(np.mean(labels[name] == commonest)) for name in splits}
    if data.source == "stdlib-docs":
        from ulmfit_tools.data import tfidf_baseline

        found["test, TF-IDF + logistic regression"] = tfidf_baseline(data.splits)
    return found


def _phase_row(phase: PhaseResult) -> list[str]:
    trains = phase.trains[0] if len(phase.trains) == 1 else f"{phase.trains[0]} to {phase.trains[-1]}"
    rate = phase.learning_rate
    scores = [phase.metrics.get(key) for key in ("loss", "accuracy")]
    return [
        phase.name,
        trains,
        f"{rate:.1e}" if isinstance(rate, float) else "\n".join(f"{value:.1e}" for value in rate),
        f"{phase.epochs:g}",
        f"{phase.steps}",
        f"{phase.seconds:.0f} s",
        *["" if value is None else f"{value:.4f}" for value in scores],
    ]


def print_evaluation(result: Evaluation) -> None:
    """What was guessed, overall scores and each class by itself."""
    print_notes(result.notes)
    table = Table(title=f"{result.split}: {result.rows:,} rows")
    table.add_column("label")
    for name in ("precision", "recall", "F1", "rows"):
        table.add_column(name, justify="right")
    for row in result.per_class:
        scores = [f"{row[key]:.3f}" for key in ("precision", "recall", "f1")]
        table.add_row(str(row["label"]), *scores, str(row["support"]))
    console = _console()
    console.print(table)
    console.print("  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()))


def print_predictions(predictions: Sequence[Prediction]) -> None:
    """Label, probability and text, a row each."""
    table = Table()
    table.add_column("label", overflow="fold")
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("text", overflow="fold")
    for prediction in predictions:
        table.add_row(prediction.label, f"{prediction.score:.3f}", prediction.text)
    _console().print(table)


def write_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """A CSV file with the columns text, label, score."""
    with path.open("x", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "score"])
        writer.writerows([p.text, p.label, f"{p.score:.6f}"] for p in predictions)


def _console() -> Console:
    """A console that prints texts, labels and paths as they are: brackets are no markup, `:smile:` is no emoji."""
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 150  # a pipe has no width of its own: wide enough that no row of a log is folded
    return console
