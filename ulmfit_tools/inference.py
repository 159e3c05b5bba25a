"""Using a fine-tuned model: scores on a labelled dataset, labels for new texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from ulmfit_tools.errors import InputError
from ulmfit_tools.metrics import classification_metrics, per_class_report
from ulmfit_tools.plans.record import RunFolder


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on one split.

    Args:
        split: Which split was scored.
        rows: How many texts it has.
        metrics: accuracy, f1_macro, f1_weighted, mcc.
        per_class: For each label its precision, recall, f1 and support.
        notes: What was guessed about the data, one line each, to be said aloud.
    """

    split: str
    rows: int
    metrics: dict[str, float]
    per_class: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


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
    text_columns: str | Sequence[str] | None = None,
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
        text_columns: Text column(s); by default those that the run was trained on, else guessed.
        label_column: Label column; by default the one that the run was trained on, else guessed.
        max_length: Cut texts to this many tokens; by default to the length of the run's training.
        batch_size: Texts at a time.
        trust_remote_code: Allow a Hub model to run its own code.

    Raises:
        InputError: Bad input, or labels in the data that the model does not know.
    """
    classifier, tokenizer = _load_classifier(model, trust_remote_code)
    names = _label_names(classifier)
    trained = run_settings(model)
    data = load_for_evaluation(
        dataset,
        names,
        split=split,
        text_columns=text_columns,
        trained_columns=trained.get("text_columns"),
        label_column=label_column,
        trained_label=trained.get("label_column"),
    )
    _require_trained_form(len(data.text_columns), trained)
    notes = list(data.notes)  # without those of `tokenize`, which says them itself
    (split_name,) = data.splits
    limit = trained.get("max_length") if max_length is None else max_length
    rows = tokenize(data, tokenizer, max_length=limit, config=classifier.config)[split_name]
    logits = predict_logits(classifier, tokenizer, rows, batch_size=batch_size)
    predicted, labels = logits.argmax(-1), np.asarray(rows["labels"])
    metrics = classification_metrics(EvalPrediction(logits, labels))
    return Evaluation(split_name, len(rows), metrics, per_class_report(predicted, labels, names), notes)


def predict_texts(
    model: str,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    *,
    batch_size: int = 64,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> list[Prediction]:
    """The most probable label of each text, in the order of the texts.

    Args:
        model: A run folder, any classifier's folder or a Hub name.
        texts: The texts, or pairs of texts.
        batch_size: Texts at a time.
        max_length: Cut texts to this many tokens; by default to the length of the run's training.
        trust_remote_code: Allow a Hub model to run its own code.

    Raises:
        InputError: Bad input, such as an empty text, or single texts for a run that was trained on pairs.
    """
    _check_texts(texts)
    pairs = isinstance(texts[0], tuple)
    classifier, tokenizer = _load_classifier(model, trust_remote_code)
    trained = run_settings(model)
    _require_trained_form(2 if pairs else 1, trained)
    limit = trained.get("max_length") if max_length is None else max_length
    limit = text_length_limit(tokenizer, classifier.config, limit)
    firsts, seconds = zip(*texts, strict=True) if pairs else (texts, None)
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

    Raises:
        InputError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, the texts at a time. Received: {batch_size}")
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


def _load_classifier(name: str, trust_remote_code: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that gives each text one label of several, and its tokenizer."""
    model, tokenizer = load_model_and_tokenizer(name, trust_remote_code=trust_remote_code)
    outputs, problem = len(_label_names(model)), model.config.problem_type
    if outputs < 2 or problem not in (None, "single_label_classification"):
        raise InputError(
            f'Model "{name}" does not choose one label of several, which is what is scored and predicted here: it has '
            f"num_labels={outputs}, problem_type={problem}. Use transformers.pipeline for it"
        )
    ensure_padding(tokenizer, model)
    return model, tokenizer


def _check_texts(texts: Sequence[str] | Sequence[tuple[str, str]]) -> None:
    for number, text in enumerate(texts, start=1):
        for part in text if isinstance(text, tuple) else (text,):
            if not part.strip():
                raise InputError(f"Text {number} is empty. Leave it out or give it words. Received: {text!r}")
            if not part.isascii() and part != part.encode(errors="ignore").decode():  # from a terminal not in UTF-8
                raise InputError(f"Text {number} has characters that are not Unicode: give UTF-8. Received: {text!r}")


def _require_trained_form(columns: int, trained: Mapping[str, Any]) -> None:
    """Refuses single texts for a run that was trained on pairs, and the other way round."""
    names = trained.get("text_columns", ())
    if names and len(names) != columns:
        forms = {1: "single texts", 2: "text pairs"}
        raise InputError(
            f"The model was trained on {forms[len(names)]} ({', '.join(names)}), and this data is {forms[columns]}. "
            f"Give a file, and name {'both columns, with a comma' if len(names) == 2 else 'the column'}, by "
            "--text_column"
        )


def _label_names(model: PreTrainedModel) -> list[str]:
    return [name for _, name in sorted((int(index), name) for index, name in (model.config.id2label or {}).items())]


def run_settings(model: str) -> dict[str, Any]:
    """What a run folder says about its training: columns and `max_length`; nothing for any other model."""
    folder = Path(model).expanduser()
    values: Any = RunFolder(folder).read("run.json") if (folder / "run.json").is_file() else None
    try:
        return {
            "text_columns": values["data"]["text_columns"],
            "label_column": values["data"].get("label_column"),
            "max_length": values["settings"].get("max_length"),
        }
    except (KeyError, TypeError):  # there is none, or it is another tool's
        return {}
