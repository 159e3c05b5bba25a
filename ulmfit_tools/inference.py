"""Using a fine-tuned model: scores on a labelled dataset, labels for new texts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from ulmfit_tools.data import (
    ensure_padding,
    load_for_evaluation,
    load_model_and_tokenizer,
    text_length_limit,
    tokenize,
)
from ulmfit_tools.metrics import classification_metrics, per_class_report


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on one split.

    Args:
        split: Which split was scored.
        rows: How many texts it has.
        metrics: accuracy, f1_macro, f1_weighted, mcc.
        per_class: For each label its precision, recall, f1 and support.
    """

    split: str
    rows: int
    metrics: dict[str, float]
    per_class: list[dict[str, Any]]


@dataclass(frozen=True)
class Prediction:
    """The most probable label of one text, with its probability."""

    text: str
    label: str
    score: float


def evaluate_model(
    model: str,
    dataset: str,
    *,
    split: str | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Score a model folder on one split of a dataset.

    Args:
        model: A run folder, any classifier's folder or a Hub name.
        dataset: As for training.
        split: By default `test`, else `validation`, else the only one.
        text_columns: Text column(s); by default those that the run was trained on.
        label_column: Label column; by default guessed.
        max_length: Cut texts to this many tokens; by default to the length of the run's training.
        batch_size: Texts at a time.
        trust_remote_code: Allow a Hub model to run its own code.

    Raises:
        InputError: Bad input, or labels in the data that the model does not know.
    """
    classifier, tokenizer = load_model_and_tokenizer(model, trust_remote_code=trust_remote_code)
    names = _label_names(classifier)
    trained = _run_settings(model)
    data = load_for_evaluation(
        dataset,
        names,
        split=split,
        text_columns=text_columns or trained.get("text_columns"),
        label_column=label_column,
    )
    (split_name,) = data.splits
    ensure_padding(tokenizer, classifier)
    rows = tokenize(data, tokenizer, max_length=max_length or trained.get("max_length"), config=classifier.config)[
        split_name
    ]
    logits = predict_logits(classifier, tokenizer, rows, batch_size=batch_size)
    predicted, labels = logits.argmax(-1), np.asarray(rows["labels"])
    metrics = classification_metrics(EvalPrediction(logits, labels))
    return Evaluation(split_name, len(rows), metrics, per_class_report(predicted, labels, names))


def predict_texts(
    model: str,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    *,
    batch_size: int = 64,
    max_length: int | None = None,
) -> list[Prediction]:
    """The most probable label of each text, in the order of the texts.

    Args:
        model: A run folder, any classifier's folder or a Hub name.
        texts: The texts, or pairs of texts.
        batch_size: Texts at a time.
        max_length: Cut texts to this many tokens; by default to the length of the run's training.
    """
    classifier, tokenizer = load_model_and_tokenizer(model)
    ensure_padding(tokenizer, classifier)
    limit = text_length_limit(tokenizer, classifier.config, max_length or _run_settings(model).get("max_length"))
    firsts, seconds = zip(*texts, strict=True) if isinstance(texts[0], tuple) else (texts, None)
    encoded = tokenizer(list(firsts), seconds and list(seconds), truncation="longest_first", max_length=limit)
    rows = [{key: encoded[key][i] for key in encoded} for i in range(len(texts))]
    logits = torch.from_numpy(predict_logits(classifier, tokenizer, rows, batch_size=batch_size))
    names = _label_names(classifier)
    scores, labels = torch.softmax(logits, dim=-1).max(dim=-1)
    return [
        Prediction(text if isinstance(text, str) else " | ".join(text), names[int(label)], float(score))
        for text, label, score in zip(texts, labels, scores, strict=True)
    ]


def predict_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Any, *, batch_size: int
) -> np.ndarray:
    """Logits of tokenised rows, `(rows, labels)` in float32, in the order of the rows.

    Batches are made of texts of like length, so that little is spent on padding.
    """
    device = PartialState().device
    model = model.to(device).eval()
    collate = DataCollatorWithPadding(tokenizer)
    order = np.argsort([len(row["input_ids"]) for row in rows], kind="stable")[::-1]
    logits = np.empty((len(order), len(_label_names(model))), dtype=np.float32)
    names = list(tokenizer.model_input_names)
    for start in tqdm(range(0, len(order), batch_size), desc="Predicting", disable=len(order) <= batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([{key: rows[int(i)][key] for key in names if key in rows[int(i)]} for i in chosen])
        with torch.inference_mode():
            outputs = model(**{key: tensor.to(device) for key, tensor in batch.items()})
        logits[chosen] = outputs.logits.float().cpu().numpy()
    return logits


def _label_names(model: PreTrainedModel) -> list[str]:
    return [name for _, name in sorted((int(index), name) for index, name in (model.config.id2label or {}).items())]


def _run_settings(model: str) -> dict[str, Any]:
    """What a run folder says about the data that it was trained on; nothing for any other model."""
    record = Path(model) / "run.json"
    if not record.is_file():
        return {}
    values = json.loads(record.read_text(encoding="utf-8"))
    return {"text_columns": values["data"]["text_columns"], "max_length": values["settings"].get("max_length")}
