from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny import tiny_bert
from tiny_text import colour_folder, colour_texts, tiny_tokenizer, write_csv
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    Trainer,
    TrainingArguments,
)

from ulmfit_tools.data import ensure_padding, load_text_classification, text_length_limit, tokenize
from ulmfit_tools.data.tokenizing import LENGTH_COLUMN
from ulmfit_tools.errors import InputError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def data(tmp_path):
    return load_text_classification(colour_folder(tmp_path / "colours"))


def test_tokenised_rows_are_those_of_the_tokenizer(data):
    tokenizer = tiny_tokenizer()
    splits = tokenize(data, tokenizer)
    assert {name: len(split) for name, split in splits.items()} == {"train": 96, "validation": 24, "test": 24}
    for row, (text, label) in zip(splits["test"], colour_texts(24, seed=2), strict=True):
        encoded = tokenizer(text)
        assert row == {**encoded, "labels": data.label_names.index(label), "length": len(text.split()) + 2}
    assert splits["train"].features["labels"] == data.splits["train"].features["labels"]
    assert not any("cut" in note for note in data.notes)


def test_token_type_ids_only_where_the_model_reads_them(data):
    tokenizer = tiny_tokenizer()
    assert "token_type_ids" in tokenize(data, tokenizer)["test"].column_names
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert tokenize(data, tokenizer)["test"].column_names == ["labels", "input_ids", "attention_mask", "length"]


def test_long_rows_are_cut_counted_and_said(data, caplog):
    splits = tokenize(data, tiny_tokenizer(), max_length=6)
    texts = colour_texts(96, seed=0)
    cut = sum(len(text.split()) + 2 > 6 for text, _ in texts)
    assert 0 < cut < 96
    assert f"{cut} of 96 train texts are longer than 6 tokens and are cut." in data.notes
    assert caplog.messages == [note for note in data.notes if "cut" in note]
    caplog.clear()
    assert splits["train"]["length"][:] == [min(len(text.split()) + 2, 6) for text, _ in texts]
    assert "__cut__" not in splits["train"].column_names
    notes = list(data.notes)
    tokenize(data, tiny_tokenizer(), max_length=6)
    assert data.notes == notes
    assert caplog.messages == []


def test_a_row_that_just_fits_is_not_cut(tmp_path):
    rows = [("red sea old new", "a"), ("red sea old new stone", "b")]
    data = load_text_classification(write_csv(tmp_path / "d.csv", rows), validation_split=0)
    tokenize(data, tiny_tokenizer(), max_length=6)
    assert data.notes[-1] == "1 of 2 train texts are longer than 6 tokens and are cut."


def test_pairs_are_joined_and_cut_from_the_longer_text(tmp_path):
    rows = [("red red red red red red", "blue blue", "a"), ("sea", "sky", "b")]
    path = write_csv(tmp_path / "d.csv", rows, header=("premise", "hypothesis", "label"))
    data = load_text_classification(path, validation_split=0)
    tokenizer = tiny_tokenizer()
    first, second = tokenize(data, tokenizer, max_length=8)["train"]
    assert tokenizer.decode(first["input_ids"]) == "[CLS] red red red [SEP] blue blue [SEP]"
    assert first["token_type_ids"] == [0] * 5 + [1] * 3
    assert tokenizer.decode(second["input_ids"]) == "[CLS] sea [SEP] sky [SEP]"


def test_the_result_is_memory_mapped_and_found_again(data):
    def written():
        files = [file["filename"] for split in tokenize(data, tiny_tokenizer()).values() for file in split.cache_files]
        return {file: Path(file).stat().st_mtime_ns for file in files}

    first = written()
    assert len(first) == 3
    assert written() == first


def test_batches_are_padded_to_their_longest_row(data):
    tokenizer = tiny_tokenizer()
    rows = tokenize(data, tokenizer)["train"].remove_columns(LENGTH_COLUMN)
    for multiple in (None, 8):
        collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)
        for start, batch in enumerate(DataLoader(rows, batch_size=5, collate_fn=collator)):
            longest = max(len(row["input_ids"]) for row in rows.select(range(start * 5, min(start * 5 + 5, 96))))
            assert batch["input_ids"].shape[1] == (longest if multiple is None else -(-longest // 8) * 8)


def test_trainer_groups_rows_by_the_length_column(data, tmp_path):
    tokenizer = tiny_tokenizer()
    train = tokenize(data, tokenizer)["train"]
    arguments = TrainingArguments(
        tmp_path / "run",
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=8,
        report_to=[],
        use_cpu=True,
    )
    assert arguments.length_column_name == LENGTH_COLUMN
    trainer = Trainer(tiny_bert(), arguments, train_dataset=train, processing_class=tokenizer)
    widths = [batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader()]
    # Grouped, the first batch is the one with the longest row, and the padding is less than that of random batches.
    assert widths[0] == max(train["length"])
    assert sum(widths) * 8 < 96 * max(train["length"]) * 0.9


@pytest.mark.parametrize(
    ("tokenizer_limit", "positions", "asked", "limit"),
    [
        (512, 512, None, 512),
        (512, 512, 128, 128),
        (512, 512, 4096, 512),
        (256, 512, None, 256),
        (int(1e30), 512, None, 512),
        (int(1e30), 514, None, 512),  # Roberta
        (512, 514, None, 512),
        (int(1e30), None, None, 512),  # neither says: T5
        (int(1e30), None, 2000, 2000),
        (512, None, 2000, 512),
    ],
)
def test_text_length_limit(tokenizer_limit, positions, asked, limit):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = tokenizer_limit
    config = T5Config() if positions is None else BertConfig(max_position_embeddings=positions)
    assert text_length_limit(tokenizer, config, asked) == limit


@pytest.mark.parametrize("asked", [-1, 0, 2])
def test_a_limit_without_room_for_a_text_is_refused(asked):
    with pytest.raises(InputError, match=f"more than the 2 special tokens of a text. Received: {asked}"):
        text_length_limit(tiny_tokenizer(), None, asked)


def test_texts_longer_than_the_positions_of_the_model_run(tmp_path):
    path = write_csv(tmp_path / "d.csv", [("red " * 100, "a"), ("sea", "b")])
    data = load_text_classification(path, validation_split=0)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = int(1e30)
    model = tiny_bert()
    rows = tokenize(data, tokenizer, config=model.config)["train"].remove_columns([LENGTH_COLUMN, "labels"])
    batch = DataCollatorWithPadding(tokenizer)([rows[0], rows[1]])
    assert batch["input_ids"].shape == (2, 32)
    assert model(**batch).logits.isfinite().all()


def gpt2() -> tuple[GPT2ForSequenceClassification, PreTrainedTokenizerFast]:
    backend = tiny_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", model_max_length=32)
    config = GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=3, bos_token_id=3, eos_token_id=3
    )
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(config).eval(), tokenizer


def test_padding_for_a_tokenizer_without_a_padding_token():
    model, tokenizer = gpt2()
    assert tokenizer.pad_token is None
    note = ensure_padding(tokenizer, model)
    assert note == 'The tokenizer has no padding token; "[SEP]" serves as one.'
    assert (tokenizer.pad_token, model.config.pad_token_id) == ("[SEP]", 3)
    # A text gives the same logits alone and padded in a batch.
    tokenizer.padding_side = "right"
    texts = ["red", "sea sky stone"]
    plain = [tokenizer(text, add_special_tokens=False, return_tensors="pt") for text in texts]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    alone = torch.cat([model(ids.input_ids, attention_mask=ids.attention_mask).logits for ids in plain])
    together = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(alone, together)


def test_padding_is_left_alone_where_it_is_there():
    model, tokenizer = tiny_bert(pad_token_id=0), tiny_tokenizer()
    assert ensure_padding(tokenizer, model) is None
    assert (tokenizer.pad_token, model.config.pad_token_id) == ("[PAD]", 0)


def test_padding_needs_some_token():
    model, tokenizer = gpt2()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no special token that could serve"):
        ensure_padding(tokenizer, model)


def test_in_memory_data_is_tokenised_too(data):
    in_memory = DatasetDict({"train": Dataset.from_dict(data.splits["train"].to_dict())})
    plain = replace(data, splits=in_memory, source="memory")
    assert (
        tokenize(plain, tiny_tokenizer())["train"]["input_ids"][:]
        == (tokenize(data, tiny_tokenizer())["train"]["input_ids"][:])
    )
