import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tiny_text import colour_folder, colour_texts, write_csv

from ulmfit_tools.data.fingerprint import content_fingerprint
from ulmfit_tools.data.labels import sorted_labels
from ulmfit_tools.data.loading import load_for_evaluation, load_text_classification, read_texts
from ulmfit_tools.errors import InputError

ROWS = [(f"text number {i}", "pos" if i % 2 else "neg") for i in range(20)]
WRITTEN = [{"text": text, "label": label} for text, label in ROWS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def write(path: Path, content) -> Path:
    """Writes rows (list of dicts), text or bytes in the format that the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(content[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(content)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    else:
        path.write_text("".join(f"__label__{row['label']} {row['text']}\n" for row in content), encoding="utf-8")
    return path


def pairs(data, split="train"):
    """(text, label name) of each row, as set of what was loaded."""
    rows = data.splits[split]
    return [(*(row[name] for name in data.text_columns), data.label_names[row["labels"]]) for row in rows]


def refused(*args, **settings) -> str:
    """The one line that a load is refused with."""
    with pytest.raises(InputError) as caught:
        load_text_classification(*args, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Formats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt", ".CSV"])
def test_every_format_gives_the_same_rows_and_fingerprint(tmp_path, suffix):
    path = write(tmp_path / f"data{suffix.lower()}", WRITTEN).rename(tmp_path / f"data{suffix}")
    data = load_text_classification(path, validation_split=0)
    assert pairs(data) == ROWS
    assert data.label_names == ["neg", "pos"]
    assert data.text_columns == ("text",)
    assert data.splits["train"].features["labels"] == ClassLabel(names=["neg", "pos"])
    reference = load_text_classification(write(tmp_path / "reference" / "r.jsonl", WRITTEN), validation_split=0)
    assert data.fingerprint == reference.fingerprint


def test_words_that_tools_take_for_missing_stay_texts_and_labels(tmp_path):
    words = ["NA", "null", "None", "nan", "123", "1e5", "TRUE", "2020-01-01", "N/A", "-"]
    rows = [{"text": word, "label": label} for word in words for label in ("NA", "none")]
    data = load_text_classification(write(tmp_path / "d.csv", rows), validation_split=0)
    assert pairs(data) == [(word, label) for word in words for label in ("NA", "none")]


def test_csv_with_byte_order_mark_quoted_lines_and_blank_lines(tmp_path):
    content = '\ufefftext,label\r\n"two\nlines, with ""quotes""",a\r\n\r\n' + 'plain 5" screen,b\r\n'
    data = load_text_classification(write(tmp_path / "d.csv", content), validation_split=0)
    assert pairs(data) == [('two\nlines, with "quotes"', "a"), ('plain 5" screen', "b")]


def test_csv_with_semicolons(tmp_path):
    data = load_text_classification(write(tmp_path / "d.csv", "text;label\na, b;x\nc;y\n"), validation_split=0)
    assert pairs(data) == [("a, b", "x"), ("c", "y")]


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_csv_separator_is_the_one_that_is_no_part_of_a_name(tmp_path, mark):
    """A spreadsheet that writes semicolons leaves a comma in a name as it is, and writes columns without a name."""
    rows = [["Review, full", "Label", "", ""], ["good, really", "x", "", ""], ["too bad", "y", "", ""]]
    path = write(tmp_path / "d.csv", "\ufeff" + "".join(mark.join(row) + "\r\n" for row in rows))
    data = load_text_classification(path, validation_split=0)
    assert data.text_columns == ("Review, full",)
    assert pairs(data) == [("good, really", "x"), ("too bad", "y")]
    quoted = write(tmp_path / "q.csv", f'"Review, full"{mark}Label\na, b{mark}x\nc{mark}y\n')
    assert pairs(load_text_classification(quoted, validation_split=0)) == [("a, b", "x"), ("c", "y")]


def test_csv_field_of_any_length_and_the_limit_is_put_back(tmp_path):
    limit = csv.field_size_limit()
    long = "word " * 40_000
    data = load_text_classification(
        write(tmp_path / "d.csv", [{"text": long, "label": "a"}, {"text": "b", "label": "b"}]), validation_split=0
    )
    assert data.splits["train"][0]["text"] == long
    assert csv.field_size_limit() == limit


def test_tsv_without_quoting_keeps_lone_quotes(tmp_path):
    content = 'text\tlabel\n"unbalanced start\ta\nsaid "so" and left\tb\n'
    data = load_text_classification(write(tmp_path / "d.tsv", content), validation_split=0)
    assert pairs(data) == [('"unbalanced start', "a"), ('said "so" and left', "b")]


def test_tsv_with_quoting_is_unquoted(tmp_path):
    content = 'text\tlabel\n"a\ttab"\ta\nplain\tb\n'
    data = load_text_classification(write(tmp_path / "d.tsv", content), validation_split=0)
    assert pairs(data) == [("a\ttab", "a"), ("plain", "b")]


def test_json_lines_may_be_called_json_and_have_blank_lines(tmp_path):
    content = '{"text": "one", "label": "a"}\n\n{"text": "two", "label": "b"}\n\n'
    assert pairs(load_text_classification(write(tmp_path / "d.json", content), validation_split=0)) == [
        ("one", "a"),
        ("two", "b"),
    ]


def test_fasttext_label_ends_at_any_space(tmp_path):
    content = "__label__a\tgreat movie\n__label__b  two  spaces\n__label__a \tboth\n"
    data = load_text_classification(write(tmp_path / "d.txt", content), validation_split=0)
    assert pairs(data) == [("great movie", "a"), ("two  spaces", "b"), ("both", "a")]


def test_other_columns_do_not_matter(tmp_path):
    rows = [{"id": i, "text": text, "label": label, "nested": {"a": [i]}} for i, (text, label) in enumerate(ROWS)]
    data = load_text_classification(write(tmp_path / "d.jsonl", rows), validation_split=0)
    assert data.splits["train"].column_names == ["text", "labels"]
    assert pairs(data) == ROWS


# Labels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([10, 2, 1], ["1", "2", "10"]),
        ([1.0, 0.0, 2.0], ["0", "1", "2"]),
        ([True, False, True], ["false", "true"]),
        (["b", "B", "a"], ["B", "a", "b"]),
        (["10", "9", "-1"], ["-1", "9", "10"]),
        ([" pos", "neg ", "pos"], ["neg", "pos"]),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_label_names_and_their_order(tmp_path, values, names, suffix):
    rows = [{"text": f"t{i}", "label": value} for i, value in enumerate(values)]
    data = load_text_classification(write(tmp_path / f"d{suffix}", rows), validation_split=0)
    assert data.label_names == names
    expected = [str(value).lower() if isinstance(value, bool) else str(value).removesuffix(".0") for value in values]
    assert [label for _, label in pairs(data)] == [value.strip() for value in expected]


def test_whole_numbers_agree_however_they_are_written(tmp_path):
    write(tmp_path / "train.csv", "text,label\na,1.0\nb,0.0\nc,10.0\n")
    write(tmp_path / "test.csv", "text,label\nd,10\n")
    data = load_text_classification(tmp_path, validation_split=0)
    assert data.label_names == ["0", "1", "10"]
    assert pairs(data, "test") == [("d", "10")]


def test_versions_are_not_whole_numbers(tmp_path):
    data = load_text_classification(write(tmp_path / "d.csv", "text,label\na,1.0\nb,1.5\n"), validation_split=0)
    assert data.label_names == ["1.0", "1.5"]


def test_sorted_labels_by_number_only_where_all_are():
    assert sorted_labels(["10", "9", "x"]) == ["10", "9", "x"]
    assert sorted_labels({"10", "9"}) == ["9", "10"]


@pytest.mark.parametrize("form", ["parquet", "saved", "saved dict"])
def test_declared_label_names_keep_their_order(tmp_path, form):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["zebra", "ape", "bee"])})
    dataset = Dataset.from_dict({"text": ["a", "b", "c"], "label": [2, 0, 1]}, features=features)
    path = tmp_path / "d.parquet"
    if form == "parquet":
        dataset.to_parquet(path)
    elif form == "saved":
        path = tmp_path / "saved"
        dataset.save_to_disk(path)
    else:
        path = tmp_path / "saved"
        DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(path)
    data = load_text_classification(path, validation_split=0)
    assert data.label_names == ["zebra", "ape", "bee"]
    assert data.splits["train"]["labels"][:] == [2, 0, 1]
    if form == "saved dict":
        assert pairs(data, "test") == [("b", "zebra")]


def test_a_split_whose_labels_are_hidden_is_left_out_and_said(tmp_path):
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["n", "p"])})
    train = Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1]}, features=features)
    test = Dataset.from_dict({"sentence": ["a", "b"], "label": [-1, -1]}, features=features)
    DatasetDict({"train": train, "validation": train, "test": test}).save_to_disk(tmp_path / "saved")
    data = load_text_classification(tmp_path / "saved")
    assert list(data.splits) == ["train", "validation"]
    assert any("test left out" in note for note in data.notes)


def test_saved_dataset_with_a_selection_of_rows(tmp_path):
    whole = Dataset.from_dict({"text": [f"t{i}" for i in range(6)], "label": [0, 1, 0, 1, 0, 1]})
    whole.select([5, 2, 1]).save_to_disk(tmp_path / "saved")
    assert pairs(load_text_classification(tmp_path / "saved", validation_split=0)) == [
        ("t5", "1"),
        ("t2", "0"),
        ("t1", "1"),
    ]


# Folders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "Dev", "my_dev-set"])
def test_folder_of_splits(tmp_path, name):
    write(tmp_path / "train.csv", WRITTEN)
    write(tmp_path / f"{name}.csv", WRITTEN[:4])
    write(tmp_path / "test.jsonl", WRITTEN[:2])
    data = load_text_classification(tmp_path)
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 20, "validation": 4, "test": 2}


def test_folder_with_a_folder_for_each_split_and_shards(tmp_path):
    write(tmp_path / "train" / "part-00000-of-00002.csv", WRITTEN[:10])
    write(tmp_path / "train" / "part-00001-of-00002.csv", WRITTEN[10:])
    write(tmp_path / "test" / "data.txt", WRITTEN[:2])
    data = load_text_classification(tmp_path, validation_split=0)
    assert pairs(data) == ROWS
    assert pairs(data, "test") == ROWS[:2]


def test_other_files_of_a_folder_are_left_out_and_said(tmp_path):
    write(tmp_path / "train.csv", WRITTEN)
    write(tmp_path / "README.txt", "about")
    write(tmp_path / "README.md", "about")
    data = load_text_classification(tmp_path)
    assert [note for note in data.notes if "README" in note] == [
        f"Left out of {tmp_path.name}, as their names say no split: README.txt."
    ]


def test_folder_with_a_single_file_of_any_name(tmp_path):
    write(tmp_path / "data" / "reviews.csv", WRITTEN)
    assert pairs(load_text_classification(tmp_path / "data", validation_split=0)) == ROWS


# Columns ------------------------------------------------------------------------------------------------------------


def test_guesses_are_said(tmp_path):
    rows = [{"sentence": text, "intent": label} for text, label in ROWS]
    data = load_text_classification(write(tmp_path / "d.jsonl", rows))
    assert data.text_columns == ("sentence",)
    assert data.notes[0].startswith('Text column: "sentence" (guessed')
    assert data.notes[1].startswith('Label column: "intent" (guessed')


def test_what_is_given_is_not_said(tmp_path):
    data = load_text_classification(
        write(tmp_path / "d.csv", WRITTEN), text_columns="text", label_column="label", validation_split=0
    )
    assert data.notes == []


@pytest.mark.parametrize("given", [None, "premise,hypothesis", " premise , hypothesis", ["premise", "hypothesis"]])
def test_text_pairs(tmp_path, given):
    rows = [{"hypothesis": f"h {i}", "premise": f"p {i}", "label": i % 3} for i in range(6)]
    data = load_text_classification(write(tmp_path / "d.jsonl", rows), text_columns=given, validation_split=0)
    assert data.text_columns == ("premise", "hypothesis")
    assert pairs(data)[4] == ("p 4", "h 4", "1")


# Fingerprint --------------------------------------------------------------------------------------------------------


def fingerprint_of(folder: Path, rows, **settings) -> str:
    return load_text_classification(write(folder / "d.jsonl", rows), **settings).fingerprint


def test_fingerprint_does_not_depend_on_the_place(tmp_path):
    assert fingerprint_of(tmp_path / "a", WRITTEN) == fingerprint_of(tmp_path / "b", WRITTEN)


def test_fingerprint_changes_with_rows_labels_columns_order_and_splits(tmp_path):
    changed = [
        WRITTEN,
        [{**WRITTEN[0], "text": "text number O"}, *WRITTEN[1:]],
        [{**WRITTEN[0], "label": "pos"}, *WRITTEN[1:]],
        [{**row, "label": row["label"].upper()} for row in WRITTEN],
        [{"sentence": row["text"], "label": row["label"]} for row in WRITTEN],
        WRITTEN[::-1],
        WRITTEN[:-1],
    ]
    prints = [fingerprint_of(tmp_path / str(i), rows) for i, rows in enumerate(changed)]
    prints += [fingerprint_of(tmp_path / "seed", WRITTEN, seed=1)]
    prints += [fingerprint_of(tmp_path / "share", WRITTEN, validation_split=0.2)]
    assert len(set(prints)) == len(prints)


def test_fingerprint_sees_where_a_text_ends():
    def of(texts):
        return content_fingerprint({"train": Dataset.from_dict({"text": texts, "labels": [0, 1]})}, ["text"], [])

    assert of(["ab", "c"]) != of(["a", "bc"])
    assert of(["é", "c"]) == of(["é", "c"])


def test_fingerprint_does_not_depend_on_chunks():
    texts, labels = [f"t {i}" for i in range(50)], list(range(50))
    whole = Dataset.from_dict({"text": texts, "labels": labels})
    parts = datasets.concatenate_datasets([whole.select(range(7)), whole.select(range(7, 50))])
    assert content_fingerprint({"train": whole}, ["text"], []) == content_fingerprint({"train": parts}, ["text"], [])


def test_a_changed_file_is_read_anew(tmp_path):
    path = write(tmp_path / "d.jsonl", WRITTEN)
    first = load_text_classification(path)
    write(path, WRITTEN[:-2])
    assert load_text_classification(path).fingerprint != first.fingerprint


# Validation split ---------------------------------------------------------------------------------------------------


def test_a_validation_split_is_made_and_said(tmp_path):
    path = write_csv(tmp_path / "d.csv", [(f"text {i}", "a" if i < 30 else "b") for i in range(100)])
    data = load_text_classification(path)
    assert (len(data.splits["train"]), len(data.splits["validation"])) == (90, 10)
    assert sorted(label for _, label in pairs(data, "validation")) == ["a"] * 3 + ["b"] * 7
    assert "10 of 100 training rows are held out" in data.notes[-1]
    assert sorted(pairs(data) + pairs(data, "validation")) == sorted(
        (f"text {i}", "a" if i < 30 else "b") for i in range(100)
    )


def test_copies_of_a_text_stay_together(tmp_path):
    rows = [(f"{text}{ending}", label) for text, label in ROWS for ending in ("", " .", "!")]
    data = load_text_classification(write_csv(tmp_path / "d.csv", rows), validation_split=0.3)
    train = {text.rstrip(" .!") for text, _ in pairs(data)}
    held_out = {text.rstrip(" .!") for text, _ in pairs(data, "validation")}
    assert held_out
    assert not train & held_out


def test_the_seed_decides_the_validation_split(tmp_path):
    path = write_csv(tmp_path / "d.csv", colour_texts(90))
    held_out = [pairs(load_text_classification(path, seed=seed), "validation") for seed in (1, 1, 2)]
    assert held_out[0] == held_out[1]
    assert held_out[0] != held_out[2]


def test_a_given_validation_split_is_kept(tmp_path):
    data = load_text_classification(colour_folder(tmp_path / "d"))
    assert pairs(data, "validation") == colour_texts(24, seed=1)
    assert "has a validation split of its own" in refused(tmp_path / "d", validation_split=0.1)


@pytest.mark.parametrize("share", [-0.1, 1, 2])
def test_shares_that_make_no_sense(tmp_path, share):
    assert f"Received: {share}" in refused(write(tmp_path / "d.csv", WRITTEN), validation_split=share)


# Memory -------------------------------------------------------------------------------------------------------------


def test_texts_are_memory_mapped(tmp_path):
    data = load_text_classification(write(tmp_path / "d.csv", WRITTEN))
    for split in data.splits.values():
        (file,) = split.cache_files
        assert Path(file["filename"]).is_relative_to(tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads anonymous memory from /proc")
def test_many_rows_do_not_cost_memory(tmp_path):
    path = tmp_path / "d.csv"
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for i in range(80_000):
            file.write(f"{i} {'lorem ipsum ' * 80},{i % 5}\n")
    script = f"""
import re
from ulmfit_tools.data.loading import load_text_classification
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
load_text_classification({str(write(tmp_path / "small.csv", WRITTEN))!r})
before = anonymous()
data = load_text_classification({str(path)!r})
print(anonymous() - before)
"""
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    megabytes = path.stat().st_size / 2**20
    assert megabytes > 70
    assert float(done.stdout.split()[-1]) < megabytes / 2


# Bad input ----------------------------------------------------------------------------------------------------------

BAD_FILES = {
    "empty file": ("d.csv", "", "d.csv has no rows"),
    "header only": ("d.csv", "text,label\n", "d.csv has no rows"),
    "empty jsonl": ("d.jsonl", "\n\n", "d.jsonl has no rows"),
    "one class": ("d.csv", "text,label\na,x\nb,x\n", "one class only: x"),
    "empty text": ("d.csv", 'text,label\na,x\n"  ",y\n', 'd.csv line 3: the text "text" is empty'),
    "text is a number": ("d.jsonl", '{"text": "a", "label": 0}\n{"text": 7, "label": 1}\n', "d.jsonl line 2: "),
    "text is null": (
        "d.jsonl",
        '{"text": "a", "label": 0}\n{"text": null, "label": 1}\n',
        "not a text. Received: None",
    ),
    "text is missing": ("d.jsonl", '{"text": "a", "label": 0}\n{"txt": "b", "label": 1}\n', 'has no column "text"'),
    "label is null": (
        "d.jsonl",
        '{"text": "a", "label": 0}\n{"text": "b", "label": null}\n',
        'label "label" is missing',
    ),
    "label is nan": ("d.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label": NaN}\n', "is missing"),
    "label is empty": ("d.csv", "text,label\na,x\nb,\n", 'd.csv line 3: the label "label" is missing. Remove the row'),
    "label is a fraction": ("d.jsonl", '{"text": "a", "label": 0.5}\n', "Received: 0.5"),
    "labels are a list": ("d.jsonl", '{"text": "a", "label": ["x", "y"]}\n', "label"),
    "mixed labels": (
        "d.jsonl",
        '{"text": "a", "label": 1}\n{"text": "b", "label": "pos"}\n',
        'mixed types in "label": number (d.jsonl line 1) and text (d.jsonl line 2)',
    ),
    "mixed true and 1": ("d.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": true}\n', "mixed types"),
    "latin-1": ("d.csv", "text,label\na,x\ncaf\xe9,y\n".encode("latin-1"), "d.csv line 3 is not UTF-8 (byte 0xe9)"),
    "utf-16": ("d.txt", "text".encode("utf-16"), "d.txt line 1 is not UTF-8 (byte 0xff)"),
    "too many fields": ("d.csv", "text,label\na,x\nb, c,y\n", "has 3 fields separated by ',' where the header has 2"),
    "too few fields": ("d.csv", "text,label\na,x\nb\n", "line 3 has 1 field separated by ',' where the header has 2"),
    "open quote": ("d.csv", 'text,label\na,x\n"b,y\nc,x\n', "d.csv line 3 is broken"),
    "quote in a quoted text": ("d.csv", 'text,label\n"a "b" c",x\n', 'A quote in a quoted text is written twice ("")'),
    "column twice": ("d.csv", "text,label,text\na,x,b\n", "names a column twice: text"),
    "not json": ("d.jsonl", '{"text": "a", "label": 0}\n{"text": }\n', "d.jsonl line 2 is not JSON"),
    "no object": ("d.jsonl", '["a", 1]\n', "d.jsonl: row 1 is not an object"),
    "half a character": ("d.jsonl", '{"text": "\\ud800", "label": 0}\n', "characters that are not Unicode"),
    "not parquet": ("d.parquet", "text,label\n", "d.parquet cannot be read as Parquet"),
    "other format": ("d.xlsx", "x", "d.xlsx is none of the formats that can be read: .csv"),
    "texts alone": ("d.txt", "one text\nanother\n", 'texts without labels. Write each line as "__label__NAME text"'),
    "fasttext without label": ("d.txt", "__label__a one\nanother\n", "d.txt line 2 must be one label and a text"),
    "fasttext with two": ("d.txt", "__label__a one\n__label__a __label__b x\n", "d.txt line 2 must be one label"),
    "blank line in txt": ("d.txt", "__label__a one\n\n__label__b two\n", "d.txt line 2 is empty"),
    "fasttext without text": ("d.txt", "__label__a one\n__label__b\n", 'd.txt line 2: the text "text" is empty'),
    "nested without end": ("d.json", "[" * 100_000, "d.json is not JSON: maximum recursion depth exceeded"),
    "class with one row": ("d.csv", "text,label\na,x\nb,x\nc,y\n", "A class with one row cannot be split"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(tmp_path, case):
    name, content, expected = BAD_FILES[case]
    assert expected in refused(write(tmp_path / name, content), label_column="label" if ".txt" not in name else None)


def test_class_with_one_row_is_named_and_passes_without_a_split(tmp_path):
    path = write(tmp_path / "d.csv", "text,label\na,x\nb,x\nc,lonely\n")
    assert "lonely" in refused(path)
    assert load_text_classification(path, validation_split=0).label_names == ["lonely", "x"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("folder/trian.csv", 'There is no file or folder {0}/folder/trian.csv. Did you mean "train.csv"?'),
        ("nowhere/train.csv", "There is no file or folder"),
        ("empty", "No file in {0}/empty names its split"),
        ("names", "Found: a.csv, b.csv"),
        ("testonly", "has no train split. Splits: test"),
        ("twotrain", "Several files could be the train split: train.csv, train.jsonl"),
    ],
)
def test_bad_paths(tmp_path, source, expected):
    write(tmp_path / "folder" / "train.csv", WRITTEN)
    (tmp_path / "empty").mkdir()
    for name in ("names/a.csv", "names/b.csv", "testonly/test.csv", "twotrain/train.csv", "twotrain/train.jsonl"):
        write(tmp_path / name, WRITTEN)
    assert expected.format(tmp_path) in refused(tmp_path / source)


def test_a_file_name_with_a_slip_is_no_mere_hub_name(tmp_path, monkeypatch):
    write(tmp_path / "reviews.csv", WRITTEN)
    monkeypatch.chdir(tmp_path)
    assert refused("reviews.cvs").endswith('Did you mean "reviews.csv"?')


@pytest.mark.parametrize("name", ["imdb", "someone/some-dataset"])
def test_hub_name_without_a_network(name):
    assert f'There is no file or folder "{name}" here, and the Hub cannot be reached' in refused(name)


def test_missing_and_ambiguous_columns_are_listed(tmp_path):
    rows = [{"text": text, "coarse_label": label, "fine_label": label} for text, label in ROWS]
    path = write(tmp_path / "d.csv", rows)
    assert "could be the label: coarse_label, fine_label. Name one with --label_column" in refused(path)
    message = refused(path, label_column="coarse_lable")
    assert 'd.csv has no column "coarse_lable". Columns: text, coarse_label, fine_label.' in message
    assert message.endswith('Did you mean "coarse_label"?')
    assert 'no column "txt"' in refused(path, text_columns="txt", label_column="fine_label")
    assert "both text and label" in refused(path, text_columns="text", label_column="text")


def test_splits_must_agree(tmp_path):
    write(tmp_path / "train.csv", WRITTEN)
    write(tmp_path / "test.csv", "text,label\na,pos\nb,new\n")
    assert "test.csv has labels that the training rows lack: new" in refused(tmp_path)
    write(tmp_path / "test.csv", "text,labels\na,pos\n")
    assert 'test.csv has no label column "label". Columns: text, labels. Did you mean "labels"?' in refused(tmp_path)
    write(tmp_path / "test.csv", "text\na\n")
    assert "A file without labels is one to predict: move it elsewhere." in refused(tmp_path)


def test_copies_of_training_texts_in_other_splits_are_said(tmp_path):
    write(tmp_path / "train.csv", WRITTEN)
    new = [{"text": "a new text", "label": "pos"}]
    write(tmp_path / "test.csv", [{"text": "TEXT, number 3!", "label": "pos"}, *new])
    write(tmp_path / "dev.csv", new)
    (note,) = [note for note in load_text_classification(tmp_path).notes if "texts are" in note]
    assert note.startswith("1 of 2 test texts are training texts too")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": ["a", None, "b"], "label": [0, 1, 0]}, 'saved row 2: the text "text" is empty'),
        ({"text": ["a", "b", " \n"], "label": [0, 1, 0]}, 'saved row 3: the text "text" is empty'),
        ({"text": ["a", "b", "c"], "label": [0, None, 1]}, 'saved row 2: the label "label" is missing'),
        ({"text": ["a", "b", "c"], "label": [0.5, 1.0, 2.0]}, "Received: double"),
        ({"text": [1, 2, 3], "label": [0, 1, 0]}, '"text" of saved holds no texts'),
    ],
)
def test_bad_saved_dataset(tmp_path, columns, expected):
    Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    assert expected in refused(tmp_path / "saved", text_columns="text", label_column="label")


def damage(folder: Path, form: str) -> None:
    """Spoils the folder of a saved `DatasetDict`."""
    if form == "empty split":
        Dataset.from_dict({"text": [], "label": []}).save_to_disk(folder / "test")
    elif form == "rows cut off":
        (rows,) = (folder / "train").glob("*.arrow")
        rows.write_bytes(rows.read_bytes()[:100])
    elif form == "no rows":
        next((folder / "train").glob("*.arrow")).unlink()
    else:
        (folder / "dataset_dict.json").write_text({"no json": "{", "no splits": "{}", "a list": "[]"}[form])


@pytest.mark.parametrize("form", ["empty split", "rows cut off", "no rows", "no json", "no splits", "a list"])
def test_damaged_saved_dataset(tmp_path, form):
    saved = Dataset.from_list(WRITTEN)
    DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "saved")
    damage(tmp_path / "saved", form)
    assert f"{tmp_path}/saved cannot be read as a save_to_disk folder" in refused(tmp_path / "saved")


def test_a_state_file_alone_makes_no_saved_dataset(tmp_path):
    write(tmp_path / "train.csv", WRITTEN)
    write(tmp_path / "state.json", "{}")
    assert pairs(load_text_classification(tmp_path, validation_split=0)) == ROWS


# Evaluation and prediction ------------------------------------------------------------------------------------------


def test_evaluation_maps_labels_to_those_of_the_model(tmp_path):
    colour_folder(tmp_path)
    data = load_for_evaluation(tmp_path, ["warm", "other", "grey", "cold"])
    assert list(data.splits) == ["test"]
    assert pairs(data, "test") == colour_texts(24, seed=2)
    assert data.splits["test"]["labels"][:3] == [0, 3, 2]
    assert list(load_for_evaluation(tmp_path, ["warm", "grey", "cold"], split="validation").splits) == ["validation"]


def test_evaluation_of_a_single_file_with_one_class(tmp_path):
    path = write_csv(tmp_path / "d.csv", [("a", "warm"), ("b", "warm")])
    assert load_for_evaluation(path, ["cold", "warm"]).splits["train"]["labels"][:] == [1, 1]


def test_evaluation_reads_whole_numbers_however_they_are_written(tmp_path):
    path = write_csv(tmp_path / "d.csv", [("a", "1.0"), ("b", "0.0")])
    assert load_for_evaluation(path, ["0", "1"]).splits["train"]["labels"][:] == [1, 0]


def test_evaluation_refuses_unknown_labels_and_splits(tmp_path):
    colour_folder(tmp_path)
    with pytest.raises(InputError, match=r"labels that the model does not know: grey\. The model knows: cold, warm"):
        load_for_evaluation(tmp_path, ["cold", "warm"])
    with pytest.raises(InputError, match=r'no split "tests"\. Splits: train, validation, test\. Did you mean "test"'):
        load_for_evaluation(tmp_path, ["cold", "warm", "grey"], split="tests")


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        (["True", "False"], ["false", "true"], [1, 0]),  # pandas wrote the file, the model is of a JSON file
        (["true", "false"], ["False", "True"], [1, 0]),
        (["True", "unsure"], ["true", "unsure"], [0, 1]),
    ],
)
def test_true_and_false_may_be_written_otherwise_than_the_model_has_them(labels, names, indices, tmp_path):
    texts = [text for text, _ in colour_texts(2)]
    data = load_for_evaluation(write_csv(tmp_path / "d.csv", list(zip(texts, labels, strict=True))), names)
    assert data.splits["train"]["labels"][:] == indices
    assert sum("in other letters" in note for note in data.notes) == 1


@pytest.mark.parametrize(
    ("labels", "names"), [(["true"], ["True", "TRUE"]), (["Warm"], ["warm", "cold"]), (["true"], ["True", "truE"])]
)
def test_other_labels_are_matched_letter_by_letter(labels, names, tmp_path):
    path = write_csv(tmp_path / "d.csv", [("the red sky", labels[0])])
    with pytest.raises(InputError, match="labels that the model does not know"):
        load_for_evaluation(path, names)
    exact = load_for_evaluation(path, [*names, labels[0]])
    assert exact.splits["train"]["labels"][:] == [2]
    assert not any("in other letters" in note for note in exact.notes)


def test_evaluation_prefers_the_columns_of_the_training(tmp_path):
    rows = [{"text": "a text", "title": "a title", "label": "warm"}] * 2
    path = write(tmp_path / "d.jsonl", rows)
    assert load_for_evaluation(path, ["warm"]).text_columns == ("text",)
    assert load_for_evaluation(path, ["warm"], trained_columns=["title"]).text_columns == ("title",)
    assert load_for_evaluation(path, ["warm"], trained_columns=["title", "body"]).text_columns == ("text",)
    given = load_for_evaluation(path, ["warm"], text_columns="text", trained_columns=["title"])
    assert given.text_columns == ("text",)


def test_read_texts(tmp_path):
    guessed = ['Text column: "text" (guessed; --text_column says otherwise).']
    lines = write(tmp_path / "t.txt", "one text\nanother, with comma\n\n")
    assert read_texts(lines) == (["one text", "another, with comma"], guessed)
    assert read_texts(write(tmp_path / "t.csv", WRITTEN)) == ([text for text, _ in ROWS], guessed)
    assert read_texts(write(tmp_path / "one.csv", "review\nfine\nNA\n"))[0] == ["fine", "NA"]
    pair = write(tmp_path / "p.jsonl", [{"a": "first one", "b": "second one", "text": "third one"}])
    assert read_texts(pair, "a,b") == ([("first one", "second one")], [])
    assert read_texts(pair, trained_columns=["b", "a"]) == ([("second one", "first one")], [])
    assert read_texts(pair, trained_columns=["b", "c"]) == (["third one"], guessed)
    assert read_texts(pair, "b", trained_columns=["a"]) == (["second one"], [])


def test_read_texts_refuses_in_one_line(tmp_path):
    write(tmp_path / "texts.csv", "text\na\n\n")
    with pytest.raises(InputError, match=r'There is no file .*text\.csv\. Did you mean "texts\.csv"'):
        read_texts(tmp_path / "text.csv")
    with pytest.raises(InputError, match=r"t\.txt line 1 is empty"):
        read_texts(write(tmp_path / "t.txt", "\nb\n"))
