"""Which models divide their loss by the items of all batches of an update."""

import pytest
from tiny import tiny_bert
from torch import nn
from transformers import BertConfig, BertLMHeadModel

from ulmfit_tools.losses import loss_counts_items


class Named(nn.Module):
    def forward(self, x, num_items_in_batch=None):
        return x


class Swallows(nn.Module):
    def forward(self, x, **kwargs):
        return x


class HandsOn(nn.Module):
    def forward(self, x, **kwargs):
        return self.loss_function(x, **kwargs)


class Wrapped(nn.Module):
    """As PEFT wraps: the base model decides."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def get_base_model(self):
        return self.base

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


@pytest.mark.parametrize(
    ("model", "counts"),
    [
        (Named(), True),
        (Swallows(), False),
        (HandsOn(), True),
        (Wrapped(HandsOn()), True),
        (Wrapped(Swallows()), False),
        (tiny_bert(), False),  # its forward has **kwargs, and its loss is the mean of a batch whatever it is told
        (BertLMHeadModel(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1,
                                    intermediate_size=4, is_decoder=True)), True),
    ],
)  # fmt: skip
def test_loss_counts_items(model, counts):
    assert loss_counts_items(model) is counts
