"""Where the frozen part ends, what leaves it, and that the rest runs from that to the same numbers."""

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model
from tiny import pad_rows, ragged_rows, tiny_bert
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, Trainer, TrainingArguments

from ulmfit_tools.feature_cache import precomputed
from ulmfit_tools.freeze_boundary import (
    Boundary,
    CannotPrecompute,
    Enough,
    Replay,
    capturing,
    find_boundary,
    in_batch,
    in_row,
    one_token,
    padded,
)
from ulmfit_tools.freezing import freeze_to, set_trainable
from ulmfit_tools.layers import layer_groups
from ulmfit_tools.replay_check import check_replay, read_positions

LAYERS = [f"bert.encoder.layer.{number}" for number in range(4)]


def inputs(rows=6):
    batch = pad_rows(ragged_rows(rows))
    del batch["labels"]
    return batch


@pytest.mark.parametrize(("frozen_to", "blocks"), [(-1, 4), (-2, 3), (2, 1)])
def test_the_boundary_is_the_last_frozen_block(frozen_to, blocks):
    model = tiny_bert()  # embeddings, four layers, head
    freeze_to(model, frozen_to)
    boundary = find_boundary(model)
    assert boundary == Boundary(LAYERS[blocks - 1], tuple(LAYERS[:blocks]), ("bert.embeddings", *LAYERS[:blocks]))
    assert boundary.holds("bert.embeddings.word_embeddings.weight")
    assert boundary.holds(f"{LAYERS[blocks - 1]}.output.dense.bias")
    assert not boundary.holds("classifier.weight")
    assert boundary.cut(1) == Boundary(LAYERS[0], (LAYERS[0],), ("bert.embeddings", LAYERS[0]))


def test_blocks_above_one_that_trains_are_not_in_the_prefix():
    model = tiny_bert()
    set_trainable(model, layer_groups(model), [2])  # chain-thaw: the second layer alone
    assert find_boundary(model).blocks == (LAYERS[0],)


def test_the_boundary_of_a_training_to_come():
    model = tiny_bert()
    names = [name for name, _ in model.named_parameters() if name.startswith(("classifier", "bert.pooler", LAYERS[3]))]
    assert find_boundary(model, names).path == LAYERS[2]


@pytest.mark.parametrize(("frozen_to", "message"), [(0, "No block of layers is frozen"), (1, "No block of layers")])
def test_nothing_worth_it_is_frozen(frozen_to, message):
    model = tiny_bert()
    freeze_to(model, frozen_to)
    with pytest.raises(CannotPrecompute, match=message):
        find_boundary(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(CannotPrecompute, match="no trainable parameters"):
        find_boundary(model)


@pytest.mark.parametrize("frozen_to", [-1, -3])
def test_the_replay_gives_the_same_bits(frozen_to):
    """The same batch, so that not even the order of additions differs."""
    model = tiny_bert().eval()
    freeze_to(model, frozen_to)
    replay = Replay(model, find_boundary(model))
    batch = inputs()
    hidden = replay.learn(batch)
    logits = model(**batch).logits
    with replay.installed():
        replay.activations = hidden
        assert torch.equal(model(**batch).logits, logits)
        replay.activations = hidden + 1
        assert not torch.equal(model(**batch).logits, logits)
    assert torch.equal(model(**batch).logits, logits)  # the layers themselves again
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_block_that_hands_on_more_than_its_output_is_found_out():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x, bias=None):
            bias = self.linear(x).mean() if bias is None else bias
            return self.norm(x + bias), bias

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embeddings = nn.Embedding(64, 4)
            self.layers = nn.ModuleList([Block(), Block(), Block()])
            self.head = nn.Linear(4, 2)

        def forward(self, input_ids, attention_mask):
            x, bias = self.embeddings(input_ids), None
            for layer in self.layers:
                x, bias = layer(x, bias)
            return {"logits": self.head(x[:, 0])}

    torch.manual_seed(0)
    model = Model()
    freeze_to(model, -2)
    replay = Replay(model, find_boundary(model))
    batch = inputs()
    hidden = replay.learn(batch)
    with pytest.raises(CannotPrecompute, match="other numbers from activations at layers.1: its layers hand on more"):
        check_replay(replay, batch, hidden)
    freeze_to(model, -1)  # above the last block nobody reads the bias
    replay = Replay(model, find_boundary(model))
    check_replay(replay, batch, replay.learn(batch))


def test_the_position_that_a_head_reads():
    batch = inputs()
    bert = tiny_bert().eval()
    freeze_to(bert, -1)
    hidden, positions = read_positions(bert, find_boundary(bert), batch)
    assert positions.tolist() == [0] * 6
    assert hidden.shape == (6, batch["input_ids"].shape[1], 16)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=3, n_head=2, pad_token_id=0, num_labels=3)
    gpt = GPT2ForSequenceClassification(config).eval()
    freeze_to(gpt, -1)
    last = (batch["attention_mask"].sum(1) - 1).tolist()
    assert read_positions(gpt, find_boundary(gpt), batch)[1].tolist() == last
    freeze_to(gpt, -2)  # attention above the boundary reads all tokens
    assert read_positions(gpt, find_boundary(gpt), batch)[1] is None


def test_padding_and_back():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])  # on the right, and on the left
    vectors = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert padded(vectors, mask)[..., 0].tolist() == [[1, 2, 0], [0, 3, 4]]
    assert in_row(torch.tensor([1, 1]), mask) == [1, 0]
    assert in_batch([1, 0], mask).tolist() == [1, 1]
    batch = {"input_ids": torch.tensor([[5, 6, 0], [0, 7, 8]]), "attention_mask": mask, "scale": torch.ones(2)}
    one = one_token(batch, torch.tensor([0, 2]))
    assert one["input_ids"].tolist() == [[5], [8]]
    assert one["attention_mask"].tolist() == [[1], [1]]
    assert one["scale"].tolist() == [1, 1]


def test_capturing_ends_with_its_block():
    model = tiny_bert()
    with capturing(model, [LAYERS[0]], last=LAYERS[0]) as captured, pytest.raises(Enough):
        model(**inputs())
    assert list(captured) == [LAYERS[0]]
    assert all(not module._forward_hooks for module in model.modules())


# Not in the sequence form in the middle: several modules make up a block (XLM, FlauBERT), more is handed on than the
# activations (encoder-decoders, LiLT), tokens are merged or the batch is turned (Funnel, CANINE, Perceiver, XLNet,
# SqueezeBERT), padding counts (FNet, Nystroemformer, YOSO, Longformer, ConvBERT in the middle), outputs have other
# forms (Reformer), or all blocks are one (ALBERT). The encoder-decoders among them can be at the head, and LiLT and
# ALBERT.
ODD = {
    "canine", "flaubert", "fnet", "funnel", "longformer", "nystromformer", "perceiver", "reformer",
    "squeezebert", "t5gemma", "t5gemma2", "xlm", "xlnet", "yoso",
}  # fmt: skip
ODD_IN_THE_MIDDLE = ODD | {
    "albert", "bart", "bigbird_pegasus", "lilt", "convbert", "mbart", "mt5", "mvp", "plbart", "t5", "umt5",
}  # fmt: skip

MEANS = {"eurobert"}  # over all tokens; the other heads read one of them


def sweep_rows():
    """Rows of eight lengths that begin and end as BERT's and BART's do."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 9, 12, 7, 6, 10, 8, 11):
        middle = torch.randint(5, 60, (length - 2,), generator=generator).tolist()
        rows.append({"input_ids": [1, *middle, 2], "labels": length % 2})
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_which_architectures_run_from_activations(architecture, tmp_path):
    model = tiny_model(architecture)
    groups = layer_groups(model)
    named = ["labels"]  # the forward of some takes them among its keyword arguments, where Trainer does not find them
    args = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, report_to="none", label_names=named)
    trainer = Trainer(model=model, args=args, train_dataset=sweep_rows(), data_collator=pad_rows)
    for trained, odd in ((1, ODD), (2, ODD_IN_THE_MIDDLE)):
        set_trainable(model, groups, range(len(groups) - trained, len(groups)))
        if architecture in odd:
            with pytest.raises(CannotPrecompute) as refused, precomputed(trainer, cache_dir=tmp_path / "cache"):
                pass
            assert "\n" not in str(refused.value)
        else:
            with precomputed(trainer, cache_dir=tmp_path / "cache") as report:
                if trained == 1:
                    assert report.form == ("sequence" if architecture in MEANS else "vector")
