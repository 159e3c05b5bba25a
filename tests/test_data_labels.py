"""Labels that are no classes are told apart from those that only look unusual."""

import random

import pytest
from tiny_text import colour_texts, write_csv

from ulmfit_tools import InputError, load_text_classification

ROWS = 60


def load(tmp_path, labels):
    texts = [text for text, _ in colour_texts(ROWS)]
    return load_text_classification(str(write_csv(tmp_path / "rows.csv", list(zip(texts, labels, strict=True)))))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [random.Random(i).random() * 5 for i in range(ROWS)],
            "are 60 numbers with fractions, as for a regression: 0",
        ),
        ([f"{i / 30:.3g}" for i in range(ROWS)], "are 60 numbers with fractions"),
        ([-0.1 * (i % 25) for i in range(ROWS)], "are 25 numbers with fractions"),
        ([[i % 2, 1] for i in range(ROWS)], r"are lists, as for several labels a row: \[0, 1\], \[1, 1\]"),
        ([["a", "b"][: 1 + i % 2] for i in range(ROWS)], r"lists, .*: \['a', 'b'\], \['a'\]"),
        ([["a", "b"][: i % 3] for i in range(ROWS)], "lists"),
    ],
)
def test_numbers_and_lists_are_no_classes(labels, message, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path, labels)
    assert "Only one class a row" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0.0, 1.0], ["0", "1"]),
        ([f"{i}.0" for i in range(10)], [str(i) for i in range(10)]),
        ([0.5, 1.0, 1.5], ["0.5", "1.0", "1.5"]),  # half stars
        (["1.5", "2.0", "10.1"], ["1.5", "10.1", "2.0"]),  # versions
        (["[NEWS]", "[SPORT]"], ["[NEWS]", "[SPORT]"]),
        (["[1]", "[2]"], ["[1]", "[2]"]),
        (["[0, 1]", "none"], ["[0, 1]", "none"]),
        (["3D", "2.5D"], ["2.5D", "3D"]),
        (["1e", "nan"], ["1e", "nan"]),
    ],
)
def test_few_numbers_and_names_in_brackets_are_classes(labels, names, tmp_path):
    every = (labels * ROWS)[:ROWS]
    assert load(tmp_path, every).label_names == names
