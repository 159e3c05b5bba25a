import pytest

from ulmfit_tools.data.columns import choose_columns, parse_text_columns
from ulmfit_tools.errors import InputError

SENTENCES = [f"this is sentence {i}" for i in range(20)]
WORDS = [f"w{i}" for i in range(20)]
CLASSES = ["a", "b"] * 10
NUMBERS = list(range(20))


@pytest.mark.parametrize(
    ("sample", "text", "label"),
    [
        # By name.
        ({"text": SENTENCES, "label": CLASSES}, ("text",), "label"),
        ({"Text": SENTENCES, "Label": CLASSES}, ("Text",), "Label"),
        ({"idx": NUMBERS, "sentence": SENTENCES, "labels": CLASSES}, ("sentence",), "labels"),
        ({"title": SENTENCES, "text": SENTENCES, "category": CLASSES}, ("text",), "category"),
        ({"title": SENTENCES, "content": SENTENCES, "topic": CLASSES}, ("content",), "topic"),
        ({"text": SENTENCES, "label": NUMBERS, "label_text": WORDS}, ("text",), "label"),
        ({"text": WORDS, "star_class": CLASSES, "user": WORDS}, ("text",), "star_class"),
        # Pairs.
        ({"premise": SENTENCES, "hypothesis": SENTENCES, "label": CLASSES}, ("premise", "hypothesis"), "label"),
        ({"question": SENTENCES, "sentence": SENTENCES, "label": CLASSES}, ("question", "sentence"), "label"),
        ({"Hypothesis": SENTENCES, "Premise": SENTENCES, "y": CLASSES}, ("Premise", "Hypothesis"), "y"),
        ({"premise": SENTENCES, "text": SENTENCES, "hypothesis": SENTENCES, "y": CLASSES}, ("text",), "y"),
        # By type: the only strings, the only sentences; the only column that repeats its values.
        ({"id": NUMBERS, "remark": WORDS, "y": CLASSES}, ("remark",), "y"),
        ({"id": WORDS, "remark": SENTENCES, "mood": CLASSES}, ("remark",), "mood"),
        ({"id": NUMBERS, "remark": SENTENCES, "mood": [1, 2] * 10}, ("remark",), "mood"),
        # A text column with a few rows that are not texts is still the text column.
        ({"text": [7, None, *SENTENCES[2:]], "label": CLASSES}, ("text",), "label"),
    ],
)
def test_one_sensible_choice(sample, text, label):
    columns = choose_columns(sample, where="d.csv")
    assert (columns.text, columns.label) == (text, label)
    assert len(columns.notes) == 2


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ({"text": SENTENCES, "coarse_label": CLASSES, "fine_label": CLASSES}, "label: coarse_label, fine_label"),
        ({"text": SENTENCES, "intent": CLASSES, "topic": CLASSES}, "label: intent, topic"),
        ({"text": SENTENCES, "label": CLASSES, "Label": CLASSES}, "label: label, Label"),
        ({"text": SENTENCES, "Text": SENTENCES, "label": CLASSES}, "text: text, Text"),
        ({"text1": SENTENCES, "text2": SENTENCES, "Text2": SENTENCES, "y": CLASSES}, "text: text1, text2, Text2"),
        ({"text": SENTENCES, "mood": CLASSES, "size": CLASSES}, "label: mood, size"),
        ({"text": SENTENCES, "id": NUMBERS}, "surely the label. Columns: text, id. Name one"),
        (
            {"text": SENTENCES, "label": [["a"], ["b"]]},
            "Columns: text, label. Not one text .* a row, but .*: label. Name",
        ),
        ({"review": SENTENCES, "content": SENTENCES, "label": CLASSES}, "text: review, content"),
        ({"first": SENTENCES, "second": SENTENCES, "label": CLASSES}, "text: first, second"),
        ({"a": NUMBERS, "label": CLASSES}, "surely the text. Columns: a, label"),
    ],
)
def test_no_sensible_choice_lists_the_candidates(sample, expected):
    with pytest.raises(InputError, match=expected):
        choose_columns(sample, where="d.csv")


def test_what_is_given_is_taken_and_not_said():
    sample = {"one": SENTENCES, "two": SENTENCES, "mood": CLASSES, "size": CLASSES}
    columns = choose_columns(sample, where="d.csv", text_columns=["two", "one"], label_column="size")
    assert (columns.text, columns.label, columns.notes) == (("two", "one"), "size", ())


def test_one_given_column_helps_to_guess_the_other():
    sample = {"one": SENTENCES, "two": SENTENCES, "mood": CLASSES}
    columns = choose_columns(sample, where="d.csv", text_columns="one")
    assert (columns.text, columns.label) == (("one",), "mood")
    assert choose_columns({"a": CLASSES, "b": CLASSES}, where="d.csv", label_column="a").text == ("b",)


def test_the_label_column_of_the_training_is_taken_where_the_data_have_it():
    sample = {"text": SENTENCES, "label": CLASSES, "size": CLASSES}
    taken = choose_columns(sample, where="d.csv", trained_label="size")
    assert (taken.label, len(taken.notes)) == ("size", 1)  # the text column is guessed
    assert choose_columns(sample, where="d.csv", trained_label="gone").label == "label"
    assert choose_columns(sample, where="d.csv", label_column="label", trained_label="size").label == "label"
    assert choose_columns(sample, where="d.csv", text_columns="text", trained_label="text").label == "label"


def test_without_a_label():
    columns = choose_columns({"text": SENTENCES, "mood": CLASSES, "size": CLASSES}, where="d.csv", with_label=False)
    assert (columns.text, columns.label) == (("text",), None)
    assert len(columns.notes) == 1


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (None, None),
        ("a", ("a",)),
        ("a,b", ("a", "b")),
        ("a, b", ("a", "b")),
        ("x,y", ("x,y",)),  # a column of that name
        (["a"], ("a",)),
        (("b", "a"), ("b", "a")),
    ],
)
def test_parse_text_columns(given, parsed):
    assert parse_text_columns(given, ["a", "b", "x,y"]) == parsed


@pytest.mark.parametrize("given", ["a,b,c", "a,a", [], ["a", "a"]])
def test_too_many_text_columns(given):
    with pytest.raises(InputError, match="Give one text column, or two different ones"):
        parse_text_columns(given, ["a", "b", "c"])


def test_a_text_column_called_labels_is_refused():
    with pytest.raises(InputError, match="Rename it"):
        choose_columns({"labels": SENTENCES, "y": CLASSES}, where="d.csv", text_columns="labels", label_column="y")


def test_long_lists_of_columns_are_cut():
    sample = {f"column_{i}": NUMBERS for i in range(50)} | {"x" * 100: NUMBERS}
    with pytest.raises(InputError) as caught:
        choose_columns(sample, where="d.csv", text_columns="text", label_column="label")
    assert "column_19 and 31 more" in str(caught.value)
