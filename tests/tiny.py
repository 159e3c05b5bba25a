"""Tiny models and datasets, built from configs: no network, milliseconds on a CPU."""

import torch
from transformers import BertConfig, BertForSequenceClassification

VOCABULARY = 64


def tiny_bert(
    num_labels: int = 3, num_hidden_layers: int = 4, seed: int = 0, **config
) -> BertForSequenceClassification:
    """A BERT classifier of 16 hidden units; the same seed gives the same weights."""
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_hidden_layers=num_hidden_layers,
        num_labels=num_labels,
    )
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**(settings | config)))


def token_rows(rows: int = 48, length: int = 8, num_labels: int = 3, seed: int = 0) -> list[dict]:
    """Rows of token ids whose label can be learned: the first token after the start decides it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    return [
        {"input_ids": row.tolist(), "attention_mask": [1] * length, "labels": int(row[1]) % num_labels} for row in ids
    ]


def ragged_rows(rows: int = 40, num_labels: int = 3, seed: int = 0) -> list[dict]:
    """As `token_rows`, with 3 to 16 tokens a row and no padding: `pad_rows` makes a batch of them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 17, (rows,), generator=generator).tolist()
    ids = [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row[1] % num_labels} for row in ids]


def pad_rows(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A collator for `ragged_rows`."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([r["labels"] for r in rows])}
