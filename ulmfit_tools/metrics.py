"""Metrics of a classifier: `evaluate.Metric` modules over scikit-learn that need no network and leave no files.

`evaluate.load("accuracy")` fetches its code from the Hub; these are the same metrics, here. They compute in memory, in
one process: `Trainer` gathers the predictions of all processes before it computes metrics.
"""

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, precision_recall_fscore_support
from transformers import EvalPrediction

_INPUTS = """
Args:
    predictions (`list` of `int`): Predicted classes.
    references (`list` of `int`): True classes.
"""


class LocalMetric(evaluate.Metric):
    """A metric of class indices that is computed in memory and touches no folder."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**({"keep_in_memory": True} | settings))

    def _build_data_dir(self) -> str:
        # evaluate makes a folder in the user's cache here, also for a metric that stays in memory: a run must not
        # need a home that can be written to.
        return ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description=_INPUTS,
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
        )


class Accuracy(LocalMetric):
    """The share of rows whose class is right: `{"accuracy": ...}`, from 0 to 1."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(LocalMetric):
    """The mean over classes of 2 * precision * recall / (precision + recall): `{"f1": ...}`, from 0 to 1.

    `average="macro"` counts every class the same, `"weighted"` by its number of rows. A class of which neither a row
    nor a prediction exists does not count; one that is never right counts 0.
    """

    def _compute(
        self, predictions: Sequence[int], references: Sequence[int], average: str = "macro"
    ) -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0.0))}


class MatthewsCorrelation(LocalMetric):
    """The correlation of predicted and true classes: `{"matthews_correlation": ...}`, from -1 to 1, 0 for guessing.

    For more than two classes this is Gorodkin's R_K (2004).
    """

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


class ClassificationReport(LocalMetric):
    """Precision, recall and F1 of each class: `{"classes": [...]}`, as `per_class_report` gives them."""

    def _compute(
        self, predictions: Sequence[int], references: Sequence[int], label_names: Sequence[str]
    ) -> dict[str, list[dict[str, Any]]]:
        return {"classes": per_class_report(predictions, references, label_names)}


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """What `Trainer(compute_metrics=...)` wants: accuracy, macro and weighted F1, and Matthews correlation.

    Args:
        prediction: Logits of shape (rows, classes), or a tuple that starts with them, and true classes, shape (rows,);
            a list of each, one for each batch, where `eval_do_concat_batches` is off.

    Returns:
        `accuracy`, `f1_macro`, `f1_weighted` and `mcc`.
    """
    in_batches = isinstance(prediction.predictions, list)
    found, labels = ([one] if not in_batches else one for one in (prediction.predictions, prediction.label_ids))
    # Models that also return hidden states give them behind the logits.
    logits = np.concatenate([batch[0] if isinstance(batch, tuple) else batch for batch in found])
    pair = {"predictions": np.argmax(logits, axis=-1), "references": np.concatenate(labels)}
    f1 = F1()
    return {
        "accuracy": Accuracy().compute(**pair)["accuracy"],
        "f1_macro": f1.compute(**pair, average="macro")["f1"],
        "f1_weighted": f1.compute(**pair, average="weighted")["f1"],
        "mcc": MatthewsCorrelation().compute(**pair)["matthews_correlation"],
    }


def per_class_report(
    predictions: Sequence[int] | np.ndarray, references: Sequence[int] | np.ndarray, label_names: Sequence[str]
) -> list[dict[str, Any]]:
    """How well each class is found.

    Args:
        predictions: Predicted classes, shape (rows,).
        references: True classes, shape (rows,).
        label_names: The names of the classes in the order of their indices.

    Returns:
        For each class, also one without rows: `label`, `precision`, `recall`, `f1` (each 0 where it would be 0/0) and
        `support`, the number of its rows.
    """
    precision, recall, f1, support = precision_recall_fscore_support(
        references, predictions, labels=range(len(label_names)), zero_division=0.0
    )
    columns = zip(label_names, precision, recall, f1, support, strict=True)
    return [
        {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for label, p, r, f, s in columns
    ]
