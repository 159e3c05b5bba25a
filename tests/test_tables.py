"""Tables in the terminal: what comes from the user is printed as it is."""

import dataclasses
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from rich.console import Console
from tiny import tiny_bert

from ulmfit_tools.data import TextClassificationData
from ulmfit_tools.inference import Evaluation, Prediction
from ulmfit_tools.layers import layer_groups
from ulmfit_tools.plans import PhaseResult, PlanResult
from ulmfit_tools.reporting import tables
from ulmfit_tools.reporting.tables import (
    print_data,
    print_evaluation,
    print_groups,
    print_notes,
    print_predictions,
    print_result,
)

HARD = "[/cold] [blue] :smile: [b]x[/b]"  # to rich: an error, a style, a picture, and bold type
DATA = TextClassificationData(
    splits=DatasetDict({"train": Dataset.from_dict({"text": ["a", "b"], "labels": [0, 1]})}),
    text_columns=("text",),
    label_column="label",
    label_names=[HARD, "other"],
    fingerprint="",
    source=f"source {HARD}.csv",
    notes=[f"note {HARD}"],
)
PHASE = PhaseResult(
    name=f"phase {HARD}", trains=("head",), learning_rate=1e-3, epochs=1.0, steps=3, seconds=1.0, metrics={}
)
SCORES = {"label": HARD, "precision": 1.0, "recall": 0.5, "f1": 0.667, "support": 2}
PRINTED = {
    "predictions": lambda: print_predictions([Prediction(f"text {HARD}", HARD, 0.5)]),
    "evaluation": lambda: print_evaluation(Evaluation(f"split {HARD}", 2, {"accuracy": 0.5}, [SCORES])),
    "data": lambda: print_data(DATA),
    "notes": lambda: print_notes([f"note {HARD}"]),
    "result": lambda: print_result(PlanResult(Path(f"run {HARD}"), f"plan {HARD}", [PHASE], {}, 1.0), DATA),
}
EXPECTED = {
    "predictions": [f"text {HARD}", f" {HARD} "],
    "evaluation": [f"split {HARD}: 2 rows", f" {HARD} "],
    "data": [f"source {HARD}.csv: train 2 rows; 2 labels: {HARD}, other", f"  note {HARD}"],
    "notes": [f"  note {HARD}"],
    "result": [f"Plan 'plan {HARD}'", f" phase {HARD} ", f"The model is in run {HARD} (1 s of training)."],
}


def test_a_note_is_one_line_of_a_log(capsys):
    print_notes(["word " * 60])
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("table", PRINTED)
def test_brackets_and_colons_are_printed_as_they_are(table, capsys):
    PRINTED[table]()
    printed = capsys.readouterr().out
    for text in EXPECTED[table]:
        assert text in printed


def test_groups_add_up_to_all_parameters(capsys):
    model = tiny_bert(num_hidden_layers=2)
    print_groups(model, layer_groups(model), [1e-5, 1e-4, 1e-3, 1e-2])
    total = sum(parameter.numel() for parameter in model.parameters())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " all " in line]
    assert f" {total:,} " in line
    assert " 100.0% " in line


def test_scores_stand_beside_those_of_the_commonest_label(capsys):
    """0.75 is nothing where three of four rows have one label; it is the training rows that say which."""
    train = Dataset.from_dict({"text": list("abcd"), "labels": [1, 1, 1, 0]})
    validation = Dataset.from_dict({"text": list("efgh"), "labels": [0, 1, 1, 1]})
    splits = DatasetDict({"train": train, "validation": validation})
    metrics = {"validation": {"accuracy": 0.75, "f1_macro": 0.4286}}
    print_result(PlanResult(Path("run"), "plan", [PHASE], metrics, 1.0), dataclasses.replace(DATA, splits=splits))
    printed = capsys.readouterr().out
    assert "validation, always 'other' │   0.7500 │" in printed
    print_result(PlanResult(Path("run"), "plan", [PHASE], {}, 1.0), DATA)
    assert "F1 weighted" not in capsys.readouterr().out  # no table without a row


@pytest.mark.parametrize(
    "label", ["short", "a/very/long/label/of/some/taxonomy/of/a/shop/with/all/of/its/parts/to/the/end"]
)
def test_no_column_of_the_predictions_vanishes(capsys, monkeypatch, label):
    monkeypatch.setattr(tables, "_console", lambda: Console(markup=False, emoji=False, width=80))
    print_predictions([Prediction("some words " * 20, label, 0.5)])
    printed = capsys.readouterr().out
    assert all(part in printed for part in (label[:5], "0.500", "some words"))


def test_the_phases_fit_a_terminal_of_80_columns(capsys, monkeypatch):
    """The texts once gave way to the numbers until nothing of them was left."""
    monkeypatch.setattr(tables, "_console", lambda: Console(markup=False, emoji=False, width=80))
    changes = {"trains": ("embeddings..layer.2", "head"), "steps": 12345, "seconds": 12345.0}
    scores = {"loss": 0.1234, "accuracy": 0.5678}
    phase = dataclasses.replace(PHASE, name="head", learning_rate=(5e-5, 5e-4), metrics=scores, **changes)
    print_result(PlanResult(Path("run"), "plan", [phase], {}, 1.0), DATA)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (first,) = [line for line in lines if "0.1234" in line]
    cells = [cell.strip() for cell in first.strip("│").split("│")]
    assert cells == ["head", "embeddings.", "5.0e-05", "1", "12345", "12345 s", "0.1234", "0.5678"]
