import math
import os
import subprocess
import sys

import numpy as np
import pytest
from transformers import EvalPrediction

from ulmfit_tools.metrics import (
    F1,
    Accuracy,
    ClassificationReport,
    MatthewsCorrelation,
    classification_metrics,
    per_class_report,
)

#               a  a  a  a  b  b  b  c  c  c
REFERENCES = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
PREDICTIONS = [0, 0, 0, 1, 1, 1, 0, 2, 1, 1]
# By hand: a: 3 of 4 predicted right, 3 of 4 rows found; b: 2 of 5 and 2 of 3; c: 1 of 1 and 1 of 3.
PRECISION = [3 / 4, 2 / 5, 1]
RECALL = [3 / 4, 2 / 3, 1 / 3]
F1S = [2 * p * r / (p + r) for p, r in zip(PRECISION, RECALL, strict=True)]


def inputs(**settings):
    return {"predictions": PREDICTIONS, "references": REFERENCES, **settings}


def test_accuracy():
    assert Accuracy().compute(**inputs()) == {"accuracy": 0.6}


def test_f1():
    assert F1().compute(**inputs()) == {"f1": pytest.approx(sum(F1S) / 3)}
    weighted = (4 * F1S[0] + 3 * F1S[1] + 3 * F1S[2]) / 10
    assert F1().compute(**inputs(average="weighted")) == {"f1": pytest.approx(weighted)}


def test_matthews_correlation():
    # Two classes: (tp * tn - fp * fn) / sqrt((tp+fp)(tp+fn)(tn+fp)(tn+fn)) with tp 3, tn 2, fp 1, fn 2.
    found = MatthewsCorrelation().compute(predictions=[1, 1, 1, 0, 0, 0, 0, 1], references=[1, 1, 1, 1, 1, 0, 0, 0])
    assert found == {"matthews_correlation": pytest.approx((3 * 2 - 1 * 2) / math.sqrt(4 * 5 * 3 * 4))}
    # Gorodkin's R_K from the confusion: (c s - sum p_k t_k) / sqrt((s^2 - sum p_k^2)(s^2 - sum t_k^2)).
    right, rows, predicted, true = 6, 10, [4, 5, 1], [4, 3, 3]
    expected = (right * rows - sum(p * t for p, t in zip(predicted, true, strict=True))) / math.sqrt(
        (rows**2 - sum(p * p for p in predicted)) * (rows**2 - sum(t * t for t in true))
    )
    assert MatthewsCorrelation().compute(**inputs()) == {"matthews_correlation": pytest.approx(expected)}
    assert MatthewsCorrelation().compute(predictions=[1, 1], references=[0, 1]) == {"matthews_correlation": 0}


def test_per_class_report():
    report = per_class_report(PREDICTIONS, REFERENCES, ["a", "b", "c", "d"])
    assert [row["label"] for row in report] == ["a", "b", "c", "d"]
    assert [row["precision"] for row in report] == pytest.approx([*PRECISION, 0])
    assert [row["recall"] for row in report] == pytest.approx([*RECALL, 0])
    assert [row["f1"] for row in report] == pytest.approx([*F1S, 0])
    assert [row["support"] for row in report] == [4, 3, 3, 0]
    assert ClassificationReport().compute(**inputs(label_names=["a", "b", "c", "d"])) == {"classes": report}


def test_a_class_that_is_never_right_counts_zero():
    assert F1().compute(predictions=[0, 0, 1], references=[0, 0, 2]) == {"f1": pytest.approx(1 / 3)}


def logits(predictions, classes=3):
    return np.eye(classes, dtype=np.float32)[predictions] * 3 - 1


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x, np.zeros((10, 2, 4)))])
def test_classification_metrics_of_a_trainer(form):
    found = classification_metrics(EvalPrediction(form(logits(PREDICTIONS)), np.array(REFERENCES)))
    assert found == {
        "accuracy": 0.6,
        "f1_macro": pytest.approx(sum(F1S) / 3),
        "f1_weighted": pytest.approx((4 * F1S[0] + 3 * F1S[1] + 3 * F1S[2]) / 10),
        "mcc": MatthewsCorrelation().compute(**inputs())["matthews_correlation"],
    }
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("with_states", [False, True])
def test_for_trainer_that_hands_batches_out(with_states):
    """As with `eval_do_concat_batches=False`."""
    whole = classification_metrics(EvalPrediction(logits(PREDICTIONS), np.array(REFERENCES)))
    batches = np.array_split(logits(PREDICTIONS), [4, 8])
    found = [(batch, np.zeros(3)) for batch in batches] if with_states else batches
    assert classification_metrics(EvalPrediction(found, np.array_split(REFERENCES, [4, 8]))) == whole


def test_batches_add_up():
    metric = Accuracy()
    for start in range(0, 10, 3):
        metric.add_batch(predictions=PREDICTIONS[start : start + 3], references=REFERENCES[start : start + 3])
    assert metric.compute() == {"accuracy": 0.6}
    metric.add(prediction=1, reference=1)
    assert metric.compute() == {"accuracy": 1.0}


def test_numpy_state_is_left_alone():
    np.random.seed(7)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    classification_metrics(EvalPrediction(logits(PREDICTIONS), np.array(REFERENCES)))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


SCRIPT = """
import numpy as np, sys
from transformers import EvalPrediction
from ulmfit_tools.metrics import classification_metrics
for _ in range(20):
    found = classification_metrics(EvalPrediction(np.eye(3)[[0, 1, 2, 1]], np.array([0, 1, 1, 1])))
print(found["accuracy"])
"""


def test_without_a_network_or_a_home_to_write_to_and_in_two_processes_at_once(tmp_path):
    """Upstream makes folders and lock files in the user's cache; a home that is a file shows whether it tries."""
    home = tmp_path / "home"
    home.write_text("")
    environment = os.environ | {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_METRICS_CACHE", "HF_EVALUATE_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "HF_MODULES_CACHE"):
        environment.pop(name, None)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env=environment, cwd=tmp_path, stdout=-1, stderr=-1, text=True
        )
        for _ in range(2)
    ]
    for process in running:
        out, err = process.communicate(timeout=300)
        assert (out, err, process.returncode) == ("0.75\n", "", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]
