"""A tiny model folder and tiny text datasets on disk, for what starts from names and paths."""

import csv
import random
from pathlib import Path

from tiny import tiny_bert
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

COLOURS = {"warm": ["red", "orange", "yellow"], "cold": ["blue", "cyan", "teal"], "grey": ["ash", "slate", "lead"]}
FILLERS = ["the", "a", "bright", "dark", "sky", "sea", "stone", "leaf", "old", "new"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of `colour_texts`, with BERT's special tokens."""
    words = SPECIAL + FILLERS + [word for words in COLOURS.values() for word in words]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=32)


def colour_texts(rows: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label): the one colour word in the text decides the label; lengths differ, labels are balanced."""
    rng = random.Random(seed)
    pairs = []
    for i in range(rows):
        label = list(COLOURS)[i % 3]
        words = rng.choices(FILLERS, k=rng.randint(2, 8))
        words.insert(rng.randrange(len(words) + 1), rng.choice(COLOURS[label]))
        pairs.append((" ".join(words), label))
    return pairs


def write_csv(path: Path, rows: list[tuple], header: tuple[str, ...] = ("text", "label")) -> Path:
    """A CSV file with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def colour_folder(path: Path, train: int = 96, validation: int = 24, test: int = 24) -> Path:
    """A folder of splits: train.csv, validation.csv, test.csv."""
    for seed, (name, rows) in enumerate({"train": train, "validation": validation, "test": test}.items()):
        write_csv(path / f"{name}.csv", colour_texts(rows, seed))
    return path


def model_folder(path: Path, **config) -> Path:
    """A saved tiny BERT with its tokenizer, as `--model` takes it."""
    tiny_bert(**config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
