"""Text augmentation: what it changes by hand, what it leaves alone, and that it is the same again after a resume."""

import numpy as np
import pytest
import torch
from runs import differences, make_trainer, outcome
from tiny import pad_rows, ragged_rows
from tiny_text import SPECIAL, tiny_tokenizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from ulmfit_tools.data.augmentation import Augmentation, AugmentingCollator, augmented
from ulmfit_tools.data.numbered_rows import ROW
from ulmfit_tools.errors import InputError

CLS, SEP, MASK = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]"), SPECIAL.index("[MASK]")
PAIR = [CLS, 5, 6, 7, 8, SEP, 9, 10, 11, 12, 13, 14, SEP]
TYPES = [0] * 6 + [1] * 7


def changed(row=0, epoch=0, seed=0, ids=PAIR, types=TYPES, **rates):
    """One row after the augmentation, as lists."""
    collator = AugmentingCollator(lambda rows: rows, Augmentation(**rates), tiny_tokenizer(), seed)
    collator.epoch.fill_(epoch)
    features = {"input_ids": ids, "token_type_ids": types, "attention_mask": [1] * len(ids), "labels": 2, ROW: row}
    return collator([features])[0]


def texts(ids):
    """The ordinary tokens of the two texts of a pair."""
    first = ids.index(SEP)
    return ids[1:first], ids[first + 1 : -1]


@pytest.mark.parametrize(
    "rates", [{"drop": 0.5}, {"mask": 0.5}, {"swap": 0.5}, {"span": 0.4}, {"drop": 0.2, "swap": 0.9}]
)
def test_special_tokens_types_and_borders_stay(rates):
    for row in range(50):
        new = changed(row, **rates)
        ids = new["input_ids"]
        assert (ids[0], ids[-1], ids.count(CLS), ids.count(SEP)) == (CLS, SEP, 1, 2)
        first, second = texts(ids)
        assert set(first) <= {5, 6, 7, 8, MASK}
        assert set(second) <= {9, 10, 11, 12, 13, 14, MASK}
        assert min(len(first), len(second)) >= 1
        assert new["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
        assert new["attention_mask"] == [1] * len(ids)
        assert new["labels"] == 2


def test_dropping_nearly_all_leaves_one_token_of_each_text():
    for row in range(20):
        assert [len(text) for text in texts(changed(row, drop=0.9999)["input_ids"])] == [1, 1]


def test_a_span_is_cut_in_one_piece():
    for row in range(20):
        first, second = texts(changed(row, span=0.5)["input_ids"])  # 2 of 4 and 3 of 6
        assert first in ([5, 6], [5, 8], [7, 8])
        assert second in ([9, 10, 11], [9, 10, 14], [9, 13, 14], [12, 13, 14])


def test_swapping_keeps_the_words_and_masking_the_length():
    swapped = [changed(row, swap=0.3)["input_ids"] for row in range(30)]
    assert all(sorted(ids) == sorted(PAIR) and len(ids) == len(PAIR) for ids in swapped)
    assert any(ids != PAIR for ids in swapped)
    masked = [changed(row, mask=0.5)["input_ids"] for row in range(30)]
    assert all(new in (old, MASK) for ids in masked for new, old in zip(ids, PAIR, strict=True))


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_the_rates_are_met(rate):
    long = [CLS, *[7] * 20_000, SEP]
    left = len(changed(ids=long, types=[0] * len(long), drop=rate)["input_ids"]) - 2
    assert left / 20_000 == pytest.approx(1 - rate, abs=0.015)  # four standard deviations
    masked = changed(ids=long, types=[0] * len(long), mask=rate)["input_ids"].count(MASK)
    assert masked / 20_000 == pytest.approx(rate, abs=0.015)


def test_it_depends_on_seed_epoch_and_row_alone():
    rates = {"drop": 0.3, "swap": 0.3}
    assert changed(3, 1, 7, **rates) == changed(3, 1, 7, **rates)
    others = [changed(4, 1, 7, **rates), changed(3, 2, 7, **rates), changed(3, 1, 8, **rates)]
    assert all(other != changed(3, 1, 7, **rates) for other in others)


def test_rows_without_a_number_are_left_alone():
    collator = AugmentingCollator(lambda rows: rows, Augmentation(drop=0.9), tiny_tokenizer(), 0)
    row = {"input_ids": PAIR, "labels": 1}
    assert collator([row]) == [row]


def test_rows_without_ordinary_tokens_stay():
    assert changed(ids=[CLS, SEP], types=[0, 0], drop=0.9)["input_ids"] == [CLS, SEP]


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({}, "changes nothing: give one of swap, mask, span, drop"),
        ({"drop": 1}, "augment.drop is a share from 0 to below 1. Received: 1"),
        ({"mask": -0.1}, "augment.mask is a share"),
        ({"span": "much"}, "augment.span is a share"),
        ({"swap": True}, "augment.swap is a share"),
    ],
)
def test_wrong_rates_are_refused(rates, message):
    with pytest.raises(InputError, match=message):
        Augmentation(**rates)


def test_a_tokenizer_without_a_mask_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(InputError, match="no mask token.*Use drop instead"):
        AugmentingCollator(pad_rows, Augmentation(mask=0.1), tokenizer, 0)


class Stop(Exception):
    pass


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stop


def run(folder, *, stop=0, resume=None, workers=0, collate=pad_rows):
    """The outcome of an augmented training of two epochs of ten steps, or None where it was stopped."""
    trainer = make_trainer(folder, dataloader_num_workers=workers, callbacks=[StopAt(stop)])
    trainer.data_collator = collate
    with augmented(trainer, Augmentation(drop=0.3, mask=0.1), tiny_tokenizer()):
        try:
            trainer.train(resume_from_checkpoint=resume)
        except Stop:
            return None
    return outcome(trainer)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_with_the_same_texts(tmp_path, workers):
    whole = run(tmp_path / "whole")
    assert run(tmp_path / "run", stop=14, workers=workers) is None
    assert differences(whole, run(tmp_path / "run", resume=True, workers=workers)) == []


def test_every_epoch_sees_other_texts_and_evaluation_sees_the_own_ones(tmp_path):
    seen = []

    def noting(rows):
        seen.append(pad_rows(rows)["input_ids"].tolist())
        return pad_rows(rows)

    run(tmp_path, collate=noting)
    rows = [tuple(row["input_ids"]) for row in ragged_rows(12, seed=1)]
    own = {tuple(t for t in ids if t) for batch in seen for ids in batch}
    assert set(rows) <= own  # the evaluation rows as they are
    train = [tuple(row["input_ids"]) for row in ragged_rows()]
    assert len(own - set(rows)) > 1.5 * len(train)  # two epochs, nearly every row another way in each


def test_the_trainer_is_as_before_also_when_something_raises(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=args, train_dataset=ragged_rows(), data_collator=pad_rows)
    before = trainer.train_dataset, trainer.data_collator, len(trainer.callback_handler.callbacks)

    def raise_inside():
        with augmented(trainer, Augmentation(drop=0.1), tiny_tokenizer()):
            assert trainer.data_collator.augments
            assert trainer.train_dataset[5][ROW] == 5
            raise KeyError

    with pytest.raises(KeyError):
        raise_inside()
    assert (trainer.train_dataset, trainer.data_collator, len(trainer.callback_handler.callbacks)) == before
    assert trainer.args.remove_unused_columns
    assert np.array_equal(trainer.train_dataset[0]["input_ids"], ragged_rows()[0]["input_ids"])
