"""Tiny models and datasets, built from configs: no network, milliseconds on a CPU."""

import torch
from transformers import BertConfig, BertForSequenceClassification

VOCABULARY = 64


def tiny_bert(num_labels: int = 3, num_hidden_layers: int = 4, seed: int = 0, **config) -> BertForSequenceClassification:
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
