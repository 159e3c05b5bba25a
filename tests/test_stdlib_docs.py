import ast
import json
import socketserver
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from ulmfit_tools.data import load_stdlib_docs, load_text_classification, stdlib_docs, tfidf_baseline
from ulmfit_tools.data.splitting import normalised
from ulmfit_tools.data.stdlib_docs import TOPICS, near_duplicate_groups
from ulmfit_tools.errors import InputError


@pytest.fixture(scope="module")
def splits():
    return load_stdlib_docs()


def test_size_shares_and_columns(splits):
    sizes = {name: len(split) for name, split in splits.items()}
    rows = sum(sizes.values())
    assert 5_000 < rows < 10_000
    assert sizes["validation"] / rows == pytest.approx(0.1, abs=0.01)
    assert sizes["test"] / rows == pytest.approx(0.1, abs=0.01)
    assert splits["train"].column_names == ["text", "label"]
    assert splits["train"].features["label"].names == sorted(TOPICS)


def test_every_topic_is_in_every_split_in_its_share(splits):
    counts = {name: np.bincount(split["label"], minlength=len(TOPICS)) for name, split in splits.items()}
    whole = sum(counts.values())
    for name in ("validation", "test"):
        np.testing.assert_allclose(counts[name] / whole, 0.1, atol=0.02)
    # Imbalanced: the largest topic has at least twice the rows of the smallest.
    assert whole.max() > 2 * whole.min() > 200


def test_texts_are_docstrings_of_their_topic(splits):
    label_of = dict(zip(splits["train"]["text"], splits["train"]["label"], strict=True))
    for split in splits.values():
        label_of |= dict(zip(split["text"], split["label"], strict=True))
    for module, topic in ((json, "file formats"), (socketserver, "networking")):
        text = ast.get_docstring(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
        assert sorted(TOPICS)[label_of[text]] == topic


def test_no_text_has_a_copy_in_another_split(splits):
    words = {name: {normalised(text) for text in split["text"]} for name, split in splits.items()}
    assert not words["train"] & words["validation"]
    assert not words["train"] & words["test"]
    assert not words["validation"] & words["test"]


def test_no_text_has_a_near_copy_in_another_split(splits):
    texts = [text for split in splits.values() for text in split["text"]]
    groups = near_duplicate_groups(texts)
    side = np.repeat(np.arange(3), [len(split) for split in splits.values()])
    assert all(len(set(side[groups == group])) == 1 for group in np.unique(groups[side == 2]))
    # There are some, so the split had something to do.
    assert len(np.unique(groups)) < 0.95 * len(texts)


def test_the_split_is_the_same_every_time(splits):
    again = load_stdlib_docs()
    for name, split in splits.items():
        assert again[name]["text"][:] == split["text"][:]
        assert again[name]["label"][:] == split["label"][:]


def test_no_module_is_in_two_topics():
    modules = [module for names in TOPICS.values() for module in names.split()]
    assert len(modules) == len(set(modules))


def test_nothing_is_imported():
    script = (
        "import sys; from ulmfit_tools.data import load_stdlib_docs; before = set(sys.modules);"
        "load_stdlib_docs(); print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    assert not imported & {"turtle", "antigravity", "idlelib", "tkinter", "ftplib", "imaplib", "mailbox", "smtplib"}


def test_a_python_without_sources_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(stdlib_docs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(InputError, match="without the sources of its standard library"):
        load_stdlib_docs()


def test_by_name_as_a_source():
    data = load_text_classification("stdlib-docs")
    assert list(data.splits) == ["train", "validation", "test"]
    assert data.label_names == sorted(TOPICS)
    assert data.splits["train"].column_names == ["text", "labels"]


def jaccard_components(texts, threshold):
    """The slow reference: every pair of texts by sets of word triples, then components by repeated merging."""
    triples = []
    for text in texts:
        words = ["^", *normalised(text).split(), "$"]
        triples.append({tuple(words[i : i + 3]) for i in range(len(words) - 2)})
    group = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            if len(triples[i] & triples[j]) >= threshold * len(triples[i] | triples[j]):
                old, new = group[i], group[j]
                group = [new if g == old else g for g in group]
    return group


def test_near_duplicates_against_the_slow_reference(splits):
    texts = splits["test"]["text"][:300]
    texts += [text + " and more" for text in texts[:50]] + ["One.", "one", "Two", "a b c d e f", "a b c d e g"]
    found, expected = near_duplicate_groups(texts), jaccard_components(texts, 0.5)
    together = found[:, None] == found[None, :]
    np.testing.assert_array_equal(together, np.equal.outer(expected, expected))


def test_near_duplicates_by_hand():
    # "^ a b c d $" has the triples ^ab abc bcd cd$; with e for d it has ^ab abc bce ce$: two of six are common.
    # With one more word at the end, ^ab abc bcd cde de$: three of six, which is half.
    groups = near_duplicate_groups(["a b c d", "a b c e", "a b c d e", "A, b: C d!"])
    assert groups[0] == groups[2] == groups[3]
    assert groups[0] != groups[1]


def test_baseline_learns_what_words_say():
    rows = {"text": ["red one", "red two", "blue one", "blue two"] * 4, "labels": [0, 0, 1, 1] * 4}
    split = Dataset.from_dict(rows)
    wrong = Dataset.from_dict({"text": ["red", "blue", "red", "red"], "labels": [0, 1, 0, 1]})
    assert tfidf_baseline(DatasetDict({"train": split, "validation": split, "test": split})) == 1.0
    assert tfidf_baseline(DatasetDict({"train": split, "validation": split, "test": wrong})) == 0.75


@pytest.mark.slow
def test_baseline_on_the_documentation(splits):
    accuracy = tfidf_baseline(splits, label_column="label")
    assert 0.7 < accuracy < 0.85
