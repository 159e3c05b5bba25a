"""Scores and labels from a model whose head is known: with zero weights, its biases are the logits of every text."""

import json
import math

import datasets
import pytest
import torch
from tiny import tiny_bert
from tiny_text import colour_texts, tiny_tokenizer, write_csv

from ulmfit_tools.errors import InputError
from ulmfit_tools.inference import Evaluation, evaluate_model, predict_texts, run_settings

LABELS = ["cold", "grey", "warm"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """A model that gives every text cold 1/8, grey 2/8 and warm 5/8."""
    return save(tmp_path / "model", [0.0, math.log(2), math.log(5)], id2label=dict(enumerate(LABELS)))


def save(path, biases, **config):
    model = tiny_bert(num_labels=len(biases), num_hidden_layers=1, **config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor(biases))
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def trained_on(folder, *text_columns, max_length=None):
    record = {"data": {"text_columns": text_columns}, "settings": {"max_length": max_length}}
    (folder / "run.json").write_text(json.dumps(record))


def test_score_is_the_softmax_of_the_logits(folder):
    predictions = predict_texts(str(folder), ["red sky", "a sea", "the old stone"], batch_size=2)
    assert [(p.text, p.label) for p in predictions] == [
        ("red sky", "warm"),
        ("a sea", "warm"),
        ("the old stone", "warm"),
    ]
    assert [p.score for p in predictions] == pytest.approx([0.625] * 3)


def test_evaluation_counts_and_says_what_was_guessed(folder, tmp_path):
    data = write_csv(tmp_path / "d.csv", colour_texts(9))  # three of each label, all called warm
    result = evaluate_model(str(folder), str(data))
    assert isinstance(result, Evaluation)
    assert (result.rows, result.metrics["accuracy"]) == (9, pytest.approx(1 / 3))
    assert result.notes[0].startswith('Text column: "text" (guessed')
    assert result.notes[1].startswith('Label column: "label" (guessed')


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"batch_size": -1}, {"max_length": 0}, {"max_length": -3}])
def test_numbers_below_the_least_are_refused(folder, tmp_path, settings):
    trained_on(folder, "text", max_length=16)
    data = write_csv(tmp_path / "d.csv", colour_texts(9))
    ((name, value),) = settings.items()
    line = f"--{name} .* Received: {value}$"
    with pytest.raises(InputError, match=line):
        predict_texts(str(folder), ["red sky", "a sea"], **settings)
    with pytest.raises(InputError, match=line):
        evaluate_model(str(folder), str(data), **settings)


def test_evaluation_reads_the_columns_of_the_run(folder, tmp_path):
    """Else the column `text` would be read; where the run's is not there, the guess is said."""
    trained_on(folder, "review")
    rows = [("", text, label) for text, label in colour_texts(9)]
    both = write_csv(tmp_path / "both.csv", rows, header=("text", "review", "label"))
    assert [note for note in evaluate_model(str(folder), str(both)).notes if "ext column" in note] == []
    other = write_csv(tmp_path / "other.csv", colour_texts(9), header=("sentence", "label"))
    assert evaluate_model(str(folder), str(other)).notes[0].startswith('Text column: "sentence" (guessed')


def test_texts_must_have_the_form_of_the_training(folder, tmp_path):
    data = write_csv(tmp_path / "d.csv", colour_texts(9))
    trained_on(folder, "premise", "hypothesis")
    line = r"trained on text pairs \(premise, hypothesis\), and this data is single texts\. .*--text_column"
    with pytest.raises(InputError, match=line):
        predict_texts(str(folder), ["red sky"])
    with pytest.raises(InputError, match=line):
        evaluate_model(str(folder), str(data))
    assert predict_texts(str(folder), [("red sky", "a sea")])[0].text == "red sky | a sea"
    trained_on(folder, "text")
    with pytest.raises(InputError, match=r"trained on single texts \(text\), and this data is text pairs"):
        predict_texts(str(folder), [("red sky", "a sea")])


@pytest.mark.parametrize("text", ["", " \n", ("red sky", "")])
def test_an_empty_text_is_refused(folder, text):
    with pytest.raises(InputError, match="Text 2 is empty"):
        predict_texts(str(folder), [("a", "b") if isinstance(text, tuple) else "a", text])


def test_bytes_that_are_no_utf8_are_refused(folder):
    assert len(predict_texts(str(folder), ["caf\u00e9 \U0001f600"])) == 1
    with pytest.raises(InputError, match=r"Text 2 has characters that are not Unicode.*'caf\\udce9'"):
        predict_texts(str(folder), ["sky", "caf\udce9"])  # as Python reads an argument in latin-1


@pytest.mark.parametrize(
    ("biases", "config", "received"),
    [
        ([0.0], {}, "num_labels=1, problem_type=None"),
        ([0.0, 1.0], {"problem_type": "multi_label_classification"}, "problem_type=multi_label_classification"),
        ([0.0, 1.0], {"problem_type": "regression"}, "problem_type=regression"),
    ],
)
def test_a_model_that_chooses_no_label_is_refused(tmp_path, biases, config, received):
    path = save(tmp_path / "model", biases, **config)
    with pytest.raises(InputError, match=f"does not choose one label of several.*{received}"):
        predict_texts(str(path), ["red sky"])


def test_settings_of_a_run(folder):
    assert run_settings(str(folder)) == {}
    trained_on(folder, "a", "b", max_length=16)
    assert run_settings(str(folder)) == {"text_columns": ["a", "b"], "label_column": None, "max_length": 16}
    for foreign in ("{}", "[]", '{"data": "x", "settings": {}}', '{"data": {}, "settings": {}}'):
        (folder / "run.json").write_text(foreign)
        assert run_settings(str(folder)) == {}
    (folder / "run.json").write_text('{"data": ')
    with pytest.raises(InputError, match=r"run\.json cannot be read"):
        run_settings(str(folder))
