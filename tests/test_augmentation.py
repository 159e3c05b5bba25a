"""Text augmentation: what it changes by hand, what it leaves alone, and that it is the same again after a resume."""

import random
import re
from contextlib import nullcontext

import datasets
import numpy as np
import peft
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from runs import differences, make_trainer, outcome
from tiny import pad_rows, ragged_rows, tiny_bert
from tiny_text import SPECIAL, tiny_tokenizer, write_csv
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from ulmfit_tools.data import load_text_classification
from ulmfit_tools.data.augmentation import Augmentation, AugmentingCollator, _edit, augmented
from ulmfit_tools.data.numbered_rows import ROW, numbered
from ulmfit_tools.errors import InputError
from ulmfit_tools.plans import FineTuningPlan, Phase, run_plan

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


def slow_edit(ordinary, parts, draws, rates):
    """One row, as `_edit` does many at once, in plain Python: the tokens' old places, and which are masked."""
    stretches, last = [], None
    for i in range(len(ordinary)):
        if ordinary[i]:
            if last != i - 1 or any(part[i] != part[i - 1] for part in parts):
                stretches.append([])
            stretches[-1].append(i)
            last = i
    order, gone, masked = list(range(len(ordinary))), set(), set()
    for stretch in stretches:
        n, (swap, drop, mask) = len(stretch), draws[stretch, :3].T
        shift, rounding, place = draws[stretch[0], 3:]
        for k in range(int(shift < 0.5), n - 1, 2):
            if swap[k] < rates.swap:
                i, j = stretch[k : k + 2]
                order[i], order[j] = j, i
        length = min(int(n * rates.span + rounding), n - 1)
        begin = int(float(place) * (n - length + 1))
        out = {i for k, i in enumerate(stretch) if begin <= k < begin + length or drop[k] < rates.drop}
        hidden = {i for k, i in enumerate(stretch) if i not in out and mask[k] < rates.mask}
        if len(out | hidden) == n:
            saved = {stretch[int(drop.argmax())]}
            out, hidden = out - saved, hidden - saved
        gone, masked = gone | out, masked | hidden
    return [order[i] for i in range(len(ordinary)) if i not in gone], [i in masked for i in range(len(ordinary))]


def test_all_rows_at_once_are_what_each_one_is_by_itself_in_plain_python():
    generator = np.random.default_rng(0)
    for _ in range(60):
        lengths = generator.integers(1, 12, size=4)
        ordinary, types = (generator.random(lengths.sum()) < share for share in (0.8, 0.3))
        row, draws = np.repeat(np.arange(4), lengths), generator.random((lengths.sum(), 6), dtype=np.float32)
        rates = Augmentation(**dict(zip(("swap", "span", "drop", "mask"), generator.random(4) * 0.9, strict=True)))
        order, kept, masked = _edit(ordinary, [row, types], draws, rates)
        for number in range(4):
            here = row == number
            places, hidden = slow_edit(ordinary[here], [types[here]], draws[here], rates)
            first = np.flatnonzero(here)[0]
            assert [int(i) - first for i in order[here & kept]] == places
            assert masked[here].tolist() == hidden


def test_one_token_of_each_text_is_neither_dropped_nor_masked():
    for row in range(50):
        first, second = texts(changed(row, mask=0.95, drop=0.5)["input_ids"])
        assert set(first) & {5, 6, 7, 8}
        assert set(second) & {9, 10, 11, 12, 13, 14}


def test_labels_as_many_as_tokens_and_padding_stay():
    rows = [
        {"input_ids": [CLS, 5, 6, 7, SEP, 0, 0], "attention_mask": [1] * 5 + [0] * 2, "labels": [1, 0, 0, 1, 1, 0, 1]}
    ]
    for number in range(20):
        collator = AugmentingCollator(lambda rows: rows, Augmentation(drop=0.5, mask=0.2), tiny_tokenizer(), 0)
        (new,) = collator([{**rows[0], ROW: number}])
        assert new["labels"] == rows[0]["labels"]
        assert new["input_ids"][-3:] == [SEP, 0, 0]
        assert new["attention_mask"] == [1] * (len(new["input_ids"]) - 2) + [0, 0]


def test_columns_keep_their_types():
    row = {"input_ids": torch.tensor(PAIR), "token_type_ids": np.array(TYPES, dtype=np.int32), ROW: torch.tensor(3)}
    (new,) = AugmentingCollator(lambda rows: rows, Augmentation(drop=0.5), tiny_tokenizer(), 0)([row])
    assert new["input_ids"].tolist() == changed(3, drop=0.5)["input_ids"]
    assert (new["input_ids"].dtype, new["token_type_ids"].dtype) == (torch.int64, np.int32)


@pytest.mark.parametrize("tokens", [3, 10, 25])
def test_a_span_is_its_share_on_average_also_of_short_texts(tokens):
    ids = [CLS, *[7] * tokens, SEP]
    collator = AugmentingCollator(lambda rows: rows, Augmentation(span=0.1), tiny_tokenizer(), 0)
    cut = [len(ids) - len(new["input_ids"]) for new in collator([{"input_ids": ids, ROW: i} for i in range(2000)])]
    assert {int(tokens * 0.1), int(tokens * 0.1) + 1} >= set(cut)
    assert np.mean(cut) == pytest.approx(tokens * 0.1, abs=4 * 0.5 / 2000**0.5)  # four standard deviations at most


def test_swapping_moves_its_share_by_one_place():
    ids = np.array([CLS, *range(5, 20_005), SEP])
    new = np.array(changed(ids=ids.tolist(), types=[0] * len(ids), swap=0.1)["input_ids"])
    assert np.abs(new - ids)[1:-1].max() == 1
    assert (new != ids).sum() / 20_000 == pytest.approx(0.1, abs=4 * 2 * (1e4 * 0.09) ** 0.5 / 20_000)


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


def batches_of(size, index=0, count=1, workers=0):
    """The batches of one of several processes."""
    collator = AugmentingCollator(lambda rows: rows, Augmentation(drop=0.3, swap=0.3), tiny_tokenizer(), 0)
    loader = DataLoader(numbered(ragged_rows()), batch_size=size, collate_fn=collator, num_workers=workers)
    return list(prepare_data_loader(loader, num_processes=count, process_index=index, put_on_device=False))


def test_a_row_is_the_same_in_any_batch_worker_and_process():
    alone = [row for batch in batches_of(1) for row in batch]
    assert [row for batch in batches_of(8, workers=2) for row in batch] == alone
    dealt_out = zip(batches_of(4, 0, 2), batches_of(4, 1, 2), strict=True)
    assert [row for pair in dealt_out for batch in pair for row in batch] == alone


def test_workers_that_stay_are_told_of_the_next_epoch():
    def two_epochs(**loading):
        collator = AugmentingCollator(lambda rows: rows, Augmentation(drop=0.3), tiny_tokenizer(), 0)
        loader = DataLoader(numbered(ragged_rows()), batch_size=8, collate_fn=collator, **loading)
        for epoch in (0, 1):
            collator.epoch.fill_(epoch)
            yield list(loader)

    first, second = two_epochs()
    assert first != second
    assert list(two_epochs(num_workers=2, persistent_workers=True)) == [first, second]


def test_no_random_numbers_are_used_up():
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    changed(drop=0.3, swap=0.3, mask=0.3, span=0.3)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002


def test_rows_without_a_number_are_left_alone():
    collator = AugmentingCollator(lambda rows: rows, Augmentation(drop=0.9), tiny_tokenizer(), 0)
    row = {"input_ids": PAIR, "labels": 1}
    assert collator([row]) == [row]


def test_rows_without_ordinary_tokens_stay():
    assert changed(ids=[CLS, SEP], types=[0, 0], drop=0.9)["input_ids"] == [CLS, SEP]


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({}, "changes nothing: give one of swap, span, drop, mask"),
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


def generic_tokenizer(*, pair="$A $B", single="$A", **settings):
    """Words, an end token, and by default nothing around or between texts, as GPT-2's."""
    words = Tokenizer(WordLevel({"[EOS]": 0, "a": 1, "b": 2, "|": 3}, unk_token="[EOS]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=[("[EOS]", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[EOS]", **settings)


@pytest.mark.parametrize(
    ("tokenizer", "shown"),
    [
        (generic_tokenizer(), False),
        (generic_tokenizer(single="$A [EOS]", pair="$A $B [EOS]"), False),
        (generic_tokenizer(single="$A [EOS]", pair="$A [EOS] $B [EOS]"), True),
        (generic_tokenizer(pair="$A $B:1", model_input_names=["input_ids", "token_type_ids"]), True),
        (generic_tokenizer(pair="$A $B:1"), False),  # it does not give the types
        (tiny_tokenizer(), True),
    ],
)
def test_pairs_whose_border_is_not_to_be_seen_are_refused(tokenizer, shown):
    Augmentation(swap=0.1).check_tokenizer(tokenizer)
    refused = pytest.raises(InputError, match="puts nothing between the two texts of a pair")
    with nullcontext() if shown else refused:
        Augmentation(swap=0.1).check_tokenizer(tokenizer, pairs=True)


def bordered_tokenizer(single, pair, **names):
    """Word-level ids: 0 and 1 for what is put around texts, 2 to 11 for the words of a first text, then a second."""
    words = ["<s>", "</s>", *(f"{side}{i}" for side in "ab" for i in range(10))]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


BORDERS = {
    "RoBERTa": ("<s> $A </s>", "<s> $A </s> </s> $B </s>", {"bos_token": "<s>", "eos_token": "</s>"}),
    "T5": ("$A </s>", "$A </s> $B </s>", {"eos_token": "</s>"}),
    "Llama": ("<s> $A", "<s> $A <s> $B", {"bos_token": "<s>"}),
    "tokens without a name": ("<s> $A </s>", "<s> $A </s> $B </s>", {}),
}


@pytest.mark.parametrize("name", BORDERS)
def test_borders_without_token_types_are_kept(name):
    """Nothing but the special tokens tells where the second text begins, and it tells."""
    single, pair, names = BORDERS[name]
    tokenizer = bordered_tokenizer(single, pair, **names)
    texts = [" ".join(f"{side}{i}" for i in range(10)) for side in "ab"]
    ids = tokenizer(*texts)["input_ids"]
    collator = AugmentingCollator(lambda rows: rows, Augmentation(swap=0.5, drop=0.6, span=0.3), tokenizer, 0)
    new = [row["input_ids"] for row in collator([{"input_ids": ids, ROW: row} for row in range(100)])]
    assert len(set(map(tuple, new))) > 10
    assert {order_of_parts(one) for one in new} == {order_of_parts(ids)}


def order_of_parts(ids):
    """As "|a||b|" for RoBERTa's pairs."""
    return re.sub(r"([ab])\1*", r"\1", "".join("|" if i < 2 else "a" if i < 12 else "b" for i in ids))


def test_alone_it_refuses_pairs_when_it_is_told_of_them(tmp_path):
    trainer, tokenizer = make_trainer(tmp_path), generic_tokenizer()
    with augmented(trainer, Augmentation(swap=0.1), tokenizer):
        pass
    with (
        pytest.raises(InputError, match="puts nothing between the two texts of a pair"),
        augmented(trainer, Augmentation(swap=0.1), tokenizer, pairs=True),
    ):
        pass


def test_a_plan_refuses_them_before_it_trains(tmp_path):
    rows = [("the sky", "a sea", "same"), ("old leaf", "a stone", "other")] * 8
    write_csv(tmp_path / "data/train.csv", rows, header=("first", "second", "label"))
    data = load_text_classification(str(tmp_path / "data"), text_columns=["first", "second"])
    plan = FineTuningPlan(name="x", phases=[Phase(name="all", steps=1, augment=Augmentation(swap=0.1))])
    model, tokenizer = tiny_bert(num_labels=2), generic_tokenizer(pad_token="[EOS]")
    with pytest.raises(InputError, match="puts nothing between the two texts of a pair"):
        run_plan(plan, model=model, tokenizer=tokenizer, data=data, output_dir=tmp_path / "run")


def test_special_tokens_that_were_added_stay():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["xxcap"], special_tokens=True)
    tokenizer.add_tokens(["plain"])
    special, plain = tokenizer.convert_tokens_to_ids(["xxcap", "plain"])
    collator = AugmentingCollator(lambda rows: rows, Augmentation(drop=0.9), tokenizer, 0)
    rows = [{"input_ids": [CLS, special, 5, plain, 6, special, SEP], ROW: row} for row in range(20)]
    left = [row["input_ids"] for row in collator(rows)]
    assert all(ids.count(special) == 2 for ids in left)
    assert any(plain not in ids for ids in left)


class Stop(Exception):
    pass


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stop


def run(folder, *, stop=0, resume=None, collate=pad_rows, **settings):
    """The outcome of an augmented training of two epochs of ten steps, or None where it was stopped."""
    trainer = make_trainer(folder, callbacks=[StopAt(stop)], **settings)
    trainer.data_collator = collate
    with augmented(trainer, Augmentation(drop=0.3, mask=0.1), tiny_tokenizer()):
        try:
            trainer.train(resume_from_checkpoint=resume)
        except Stop:
            return None
    return outcome(trainer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stop", [5, 10, 14])  # in the middle of an epoch, and at its end
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_with_the_same_texts(whole, tmp_path, stop, workers):
    assert run(tmp_path, stop=stop, dataloader_num_workers=workers) is None
    assert differences(whole, run(tmp_path, resume=True, dataloader_num_workers=workers)) == []


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


def test_under_peft_the_batches_have_the_same_columns(tmp_path):
    pair = {"input_ids": PAIR, "token_type_ids": TYPES, "attention_mask": [1] * len(PAIR), "labels": 0, "length": 13}
    data = datasets.Dataset.from_list([pair] * 4)
    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", dataloader_pin_memory=False)
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tiny_tokenizer())

    def columns():
        return [set(next(iter(loader))) for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader())]

    plain = columns()
    assert "token_type_ids" in plain[0]
    with augmented(trainer, Augmentation(drop=0.1), tiny_tokenizer()):
        assert columns() == plain


class Rows(torch.utils.data.Dataset):
    """Rows with a text, which no model reads."""

    def __len__(self):
        return 8

    def __getitem__(self, row):
        return {**with_text(row), "text": "a text", "length": 4}


def with_text(row):
    return {"input_ids": [CLS, 5 + row, 6, 7, 8, 9, 10, 11, SEP], "attention_mask": [1] * 9, "labels": row % 2}


def transformed(columns):
    """What a dataset with a transform does: only what the transform makes is in the row."""
    return {name: list(values) for name, values in columns.items() if name in with_text(0)}


def batches(trainer):
    return [[row.tolist() for batch in loader for row in batch["input_ids"]] for loader in loaders(trainer)]


def loaders(trainer):
    return trainer.get_train_dataloader(), trainer.get_eval_dataloader()


KINDS = {
    "a list": lambda: list(map(Rows().__getitem__, range(8))),
    "a torch dataset": Rows,
    "a dataset": lambda: datasets.Dataset.from_list(list(map(Rows().__getitem__, range(8)))),
    "a dataset with a transform": lambda: datasets.Dataset.from_list(
        list(map(with_text, range(8))),
    ).with_transform(transformed),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_any_kind_are_augmented_alike(kind, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", dataloader_pin_memory=False, max_steps=2)
    args.train_sampling_strategy = "sequential"
    rows = KINDS[kind]()
    trainer = Trainer(tiny_bert(), args, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer())
    plain = [with_text(row)["input_ids"] for row in range(8)]
    assert batches(trainer) == [plain, plain]
    alone = [changed(row, ids=ids, types=[0] * 9, seed=42, mask=0.5)["input_ids"] for row, ids in enumerate(plain)]
    with augmented(trainer, Augmentation(mask=0.5), tiny_tokenizer()):
        assert batches(trainer) == [alone, plain]
        trainer.train()
    assert alone != plain


def test_rows_without_numbers_are_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    stream = datasets.Dataset.from_list(ragged_rows()).to_iterable_dataset()
    trainer = Trainer(tiny_bert(), args, train_dataset=stream, data_collator=pad_rows)
    with (
        pytest.raises(InputError, match="needs numbered rows and a length. Received: IterableDataset"),
        augmented(trainer, Augmentation(drop=0.1), tiny_tokenizer()),
    ):
        pass
