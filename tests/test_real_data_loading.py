"""Public research datasets in the formats that users have: read from $ULMFIT_TOOLS_DATA or ../shared/data."""

import os
from pathlib import Path

import datasets
import pytest
from tiny_text import tiny_tokenizer

from ulmfit_tools.data import load_for_evaluation, load_text_classification, read_texts, tokenize
from ulmfit_tools.errors import InputError

DATA = Path(os.environ.get("ULMFIT_TOOLS_DATA", Path(__file__).parents[2] / "shared" / "data"))

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(
        not (DATA / "trec").is_dir(),
        reason="TREC, SST-2, CLINC150 and the long reviews are not here: set ULMFIT_TOOLS_DATA to their folder",
    ),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "label_column", "sizes", "text", "classes"),
    [
        ("trec", "coarse_label", {"train": 4906, "validation": 546, "test": 500}, "text", 6),
        ("trec", "fine_label", {"train": 4903, "validation": 549, "test": 500}, "text", 50),
        ("sst2", None, {"train": 6920, "validation": 872, "test": 1821}, "sentence", 2),
        ("clinc150", None, {"train": 15100, "validation": 3100, "test": 5500}, "text", 151),
        ("movie_reviews_long", None, {"train": 1620, "validation": 180, "test": 200}, "text", 2),
    ],
)
def test_folder(name, label_column, sizes, text, classes):
    data = load_text_classification(DATA / name, label_column=label_column)
    # A made split rounds the share of each class, and keeps copies together: one or two rows more or less.
    found = {split: len(rows) for split, rows in data.splits.items()}
    assert found.keys() == sizes.keys()
    assert all(abs(found[split] - sizes[split]) <= classes // 10 for split in sizes)
    assert data.text_columns == (text,)
    assert len(data.label_names) == classes
    again = load_text_classification(DATA / name, label_column=label_column)
    assert again.fingerprint == data.fingerprint


def test_trec_wants_a_label_column():
    with pytest.raises(InputError, match="could be the label: coarse_label, fine_label"):
        load_text_classification(DATA / "trec")
    data = load_text_classification(DATA / "trec", label_column="coarse_label")
    assert data.label_names == ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]


@pytest.mark.parametrize("name", ["trec/train.csv", "sst2/train.jsonl", "clinc150/train.parquet"])
def test_single_file(name):
    label_column = "coarse_label" if name.startswith("trec") else None
    whole = load_text_classification(DATA / name, label_column=label_column, validation_split=0)
    split = load_text_classification(DATA / name, label_column=label_column)
    assert list(whole.splits) == ["train"]
    assert sum(map(len, split.splits.values())) == len(whole.splits["train"])
    assert read_texts(DATA / name, whole.text_columns)[0] == whole.splits["train"][whole.text_columns[0]][:]


def test_no_validation_text_is_a_training_text():
    data = load_text_classification(DATA / "trec", label_column="coarse_label")
    train = {text.lower() for text in data.splits["train"]["text"]}
    assert not train & {text.lower() for text in data.splits["validation"]["text"]}


def test_long_reviews_are_cut_and_said():
    data = load_text_classification(DATA / "movie_reviews_long")
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 512
    splits = tokenize(data, tokenizer)
    assert max(splits["train"]["length"]) == 512
    (note,) = [note for note in data.notes if "train texts are longer than 512 tokens" in note]
    cut = sum(length == 512 for length in splits["train"]["length"])
    assert cut - 10 <= int(note.split()[0].replace(",", "")) <= cut


def test_evaluation_on_the_test_split():
    data = load_for_evaluation(DATA / "sst2", ["positive", "negative"])
    assert len(data.splits["test"]) == 1821
    assert sum(data.splits["test"]["labels"]) == 912  # negative sentences of the test set
