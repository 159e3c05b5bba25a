import numpy as np
import pytest
from datasets import Dataset

from ulmfit_tools.data.splitting import normalised, stratified_split, text_groups
from ulmfit_tools.errors import InputError


def shares(labels, held_out):
    return np.bincount(np.asarray(labels)[held_out]).tolist()


@pytest.mark.parametrize(
    ("counts", "fraction", "expected"),
    [
        ([100, 50, 10], 0.1, [10, 5, 1]),
        ([100, 50, 10], 0.25, [25, 12, 2]),  # round half to even: 12.5 and 2.5
        ([97, 3], 0.1, [10, 1]),  # 9.7 up, and 0.3 to the one that a class has at least
        ([2, 2], 0.9, [1, 1]),  # never all
        ([7], 0.5, [4]),
    ],
)
def test_every_class_gives_its_share(counts, fraction, expected):
    labels = np.repeat(np.arange(len(counts)), counts)
    kept, held_out = stratified_split(labels, fraction, seed=3)
    assert shares(labels, held_out) == expected
    assert sorted([*kept, *held_out]) == list(range(sum(counts)))
    assert kept.tolist() == sorted(kept)
    assert held_out.tolist() == sorted(held_out)


def test_the_seed_decides():
    labels = [0, 1] * 50
    splits = [stratified_split(labels, 0.2, seed)[1].tolist() for seed in (5, 5, 6)]
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]


def test_the_rows_held_out_are_the_same_on_every_machine():
    # PCG64 seeded with 42 starts with 14.3, 8.1, 15.8, 12.9 and 1.7, 18.0, 14.0, 14.5 (times 1e18), and its stream is
    # fixed for good: the two smallest numbers of each class are held out.
    assert np.random.PCG64(42).random_raw(2).tolist() == [14276969152011380360, 8095878257575067585]
    assert stratified_split([0] * 4 + [1] * 4, 0.5, seed=42)[1].tolist() == [1, 3, 4, 6]


@pytest.mark.parametrize("seed", range(20))
def test_groups_stay_on_one_side_and_classes_keep_their_share(seed):
    generator = np.random.default_rng(seed)
    groups = generator.integers(0, 150, size=400)
    label_of_group = generator.integers(0, 4, size=150)
    labels = label_of_group[groups]
    kept, held_out = stratified_split(labels, 0.15, seed, groups)
    assert not set(groups[kept]) & set(groups[held_out])
    wanted = np.round(0.15 * np.bincount(labels)).astype(int)
    assert (np.bincount(labels[held_out]) <= wanted).all()
    # Groups of about three rows: the share is missed by less than the largest of them.
    assert (wanted - np.bincount(labels[held_out]) < np.bincount(groups).max()).all()


def test_groups_larger_than_the_share_give_the_smallest():
    #        label 0: groups of 6 and 4 rows; label 1: two of 5
    groups = [0] * 6 + [1] * 4 + [2] * 5 + [3] * 5
    _, held_out = stratified_split([0] * 10 + [1] * 10, 0.1, 0, groups)
    assert shares([0] * 10 + [1] * 10, held_out) == [4, 5]


def test_a_class_of_copies_is_kept_whole():
    labels = [0, 0, 0] + [1] * 10
    kept, held_out = stratified_split(labels, 0.3, 0, [7, 7, 7, *range(10)][:3] + list(range(10, 20)))
    assert shares(labels, held_out)[0] == 0
    assert set(range(3)) <= set(kept)


def test_a_group_of_two_labels_counts_for_its_first():
    # Rows 0 and 1 are one group, so they go together whichever side they are drawn to.
    labels = [0, 1, 0, 0, 1, 1]
    for seed in range(10):
        kept, held_out = stratified_split(labels, 0.4, seed, [0, 0, 1, 2, 3, 4])
        assert ({0, 1} <= set(kept)) or ({0, 1} <= set(held_out))


@pytest.mark.parametrize("seed", range(10))
def test_a_class_within_groups_of_another_keeps_a_row(seed):
    # Label 1 has two rows, each a copy of a text of label 0: with nine of ten held out, both would mostly be.
    labels = [0] * 10 + [1, 1]
    kept, held_out = stratified_split(labels, 0.9, seed, [*range(10), 0, 1])
    assert set(np.asarray(labels)[kept]) == {0, 1}
    assert sorted([*kept, *held_out]) == list(range(12))
    for copies in ({0, 10}, {1, 11}):
        assert copies <= set(kept) or copies <= set(held_out)


def test_a_class_with_one_row_is_named():
    with pytest.raises(InputError, match=r"one row cannot be split into training and validation: b, c\."):
        stratified_split([0, 0, 1, 2], 0.5, 0, label_names=["a", "b", "c"])
    with pytest.raises(InputError, match=r": 1, 2, .* and 2 more\."):
        stratified_split([0, 0, *range(1, 13)], 0.5, 0)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_fraction_out_of_range(fraction):
    with pytest.raises(InputError, match=f"Received: {fraction}"):
        stratified_split([0, 0, 1, 1], fraction, 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("What is  Straße ?\n", "what is strasse"),
        ("don't", "don t"),
        ("  ", "  "),
        (":-)", ":-)"),
        ("日本 語!", "日本 語"),
    ],
)
def test_normalised(text, words):
    assert normalised(text) == words


def test_text_groups_are_equal_for_copies_only():
    texts = ["Who is he?", "who is he", "WHO  is he ...", "Who was he?", ":-)", ":-("]
    groups = text_groups(Dataset.from_dict({"text": texts}), ["text"])
    assert groups.dtype == np.uint64
    assert groups[0] == groups[1] == groups[2]
    assert len(set(groups.tolist())) == 4


def test_text_groups_of_pairs_see_both_texts_and_their_border():
    pairs = {"a": ["x y", "x", "x y", "X y"], "b": ["z", "y z", "w", "Z."]}
    groups = text_groups(Dataset.from_dict(pairs), ["a", "b"])
    assert groups[0] == groups[3]
    assert len(set(groups.tolist())) == 3
