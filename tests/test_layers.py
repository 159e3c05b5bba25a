"""Layer groups: names, order, partition, merging, wrappers; the architectures are in test_architectures.py."""

from functools import partial

import pytest
import torch
from architectures import tiny_model
from peft import LoraConfig, PromptEncoderConfig, get_peft_model
from tiny import tiny_bert
from torch import nn

from ulmfit_tools.errors import InputError
from ulmfit_tools.layers import LayerGroup, check_partition, layer_groups

BERT_NAMES = ["embeddings", "layer.0", "layer.1", "layer.2", "layer.3", "head"]


def modules(model: nn.Module) -> dict[str, tuple[str, ...]]:
    return {group.name: group.module_names for group in layer_groups(model)}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x)


def stack(blocks: int = 2) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(blocks))


# ------------------------------------------------------------------------------------------------- names and order


def test_bert():
    model = tiny_bert()
    groups = layer_groups(model)
    assert groups.names == BERT_NAMES
    assert len(groups) == 6
    assert groups[-1].parameter_names == (
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    )
    assert groups[-1].module_names == ("bert.pooler", "classifier")
    assert groups[1].module_names == ("bert.encoder.layer.0",)
    assert all(name.startswith("bert.encoder.layer.0.") for name in groups[1].parameter_names)
    assert len(groups[1].parameter_names) == 16  # query, key, value, 3 dense, 2 norms: weight and bias each
    assert [group.name for group in groups[1:3]] == ["layer.0", "layer.1"]


def test_what_is_trainable_makes_no_difference():
    model = tiny_bert()
    before = layer_groups(model)
    for parameter in model.bert.parameters():
        parameter.requires_grad_(False)
    assert layer_groups(model) == before


def test_parameters_are_those_of_the_model():
    model = tiny_bert()
    head = layer_groups(model)[-1].parameters(model)
    assert head[2] is model.classifier.weight
    assert sum(len(group.parameters(model)) for group in layer_groups(model)) == len(list(model.parameters()))


def test_index_of():
    groups = layer_groups(tiny_bert())
    assert groups.index_of("bert.embeddings.word_embeddings.weight") == 0
    assert groups.index_of("bert.encoder.layer.3.output.dense.bias") == 4
    assert groups.index_of("classifier.bias") == 5
    with pytest.raises(InputError, match=r'parameter "classifer.bias"\. Did you mean "classifier.bias"\?'):
        groups.index_of("classifer.bias")


def test_no_parameters():
    with pytest.raises(InputError, match=r"without parameters has no layer groups\. Received: Dropout"):
        layer_groups(nn.Dropout())


def test_partition_errors_name_the_offenders():
    groups = [LayerGroup("embeddings", ("a", "b"), ()), LayerGroup("head", ("b", "c"), ())]
    with pytest.raises(RuntimeError, match=r"in no layer group: \['d'\]; in more than one: \['b'\]"):
        check_partition(groups, ["a", "b", "c", "d"])
    check_partition(groups[:1], ["a", "b"])


# --------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize(
    ("num_groups", "names"),
    [
        (6, BERT_NAMES),
        (5, ["embeddings..layer.0", "layer.1", "layer.2", "layer.3", "head"]),  # 5 = 2 + 1 + 1 + 1
        (4, ["embeddings..layer.0", "layer.1..layer.2", "layer.3", "head"]),  # 5 = 2 + 2 + 1
        (3, ["embeddings..layer.1", "layer.2..layer.3", "head"]),  # 5 = 3 + 2
        (2, ["embeddings..layer.3", "head"]),
        (1, ["embeddings..head"]),
    ],
)
def test_merging(num_groups, names):
    model = tiny_bert()
    groups = layer_groups(model, num_groups)
    assert groups.names == names
    held = [name for group in groups for name in group.parameter_names]
    assert sorted(held) == sorted(name for name, _ in model.named_parameters())


def test_merged_groups_keep_their_modules_in_order():
    middle = layer_groups(tiny_bert(), 3)[1]
    assert middle.module_names == ("bert.encoder.layer.2", "bert.encoder.layer.3")
    assert len(middle.parameter_names) == 32


@pytest.mark.parametrize("num_groups", [0, -1, 7])
def test_merging_into_more_than_there_are(num_groups):
    with pytest.raises(InputError, match=f"num_groups must be from 1 to 6, for this model. Received: {num_groups}"):
        layer_groups(tiny_bert(), num_groups)


# -------------------------------------------------------------------------------------------------------- wrappers


compiled = partial(torch.compile, backend="eager")


def unwrapped(name: str, prefix: str) -> str:
    assert name.startswith(prefix)
    return name.removeprefix(prefix)


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (nn.DataParallel, "module."),
        (compiled, "_orig_mod."),
        (lambda model: compiled(nn.DataParallel(model)), "_orig_mod.module."),
    ],
)
def test_wrapped_models_keep_their_own_names(wrap, prefix):
    plain, wrapped = layer_groups(tiny_bert()), layer_groups(wrap(tiny_bert()))
    assert wrapped.names == plain.names
    for before, after in zip(plain, wrapped, strict=True):
        assert tuple(unwrapped(name, prefix) for name in after.parameter_names) == before.parameter_names
        assert tuple(unwrapped(name, prefix) for name in after.module_names) == before.module_names


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(tiny_bert())
        assert modules(model)["head"] == ("module.bert.pooler", "module.classifier")
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_blocks():
    model = tiny_bert()
    for index, block in enumerate(model.bert.encoder.layer):
        model.bert.encoder.layer[index] = compiled(block)
    assert layer_groups(model).names == BERT_NAMES


# PEFT 0.21 asks transformers 5.23 for a name that will go.
peft_asks_for_an_old_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@peft_asks_for_an_old_name
def test_lora_adapters_go_with_the_layer_they_adapt():
    model = get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "dense"]))
    groups = layer_groups(model)
    assert groups.names == BERT_NAMES
    block = "base_model.model.bert.encoder.layer.2."
    for adapter in ("attention.self.query.lora_A.default.weight", "output.dense.lora_B.default.weight"):
        assert groups.index_of(block + adapter) == BERT_NAMES.index("layer.2")
    assert set(groups[-1].parameter_names) == {
        f"base_model.model.{name}"
        for name in (
            "bert.pooler.dense.base_layer.weight",
            "bert.pooler.dense.base_layer.bias",
            "bert.pooler.dense.lora_A.default.weight",
            "bert.pooler.dense.lora_B.default.weight",
            "classifier.original_module.weight",
            "classifier.original_module.bias",
            "classifier.modules_to_save.default.weight",
            "classifier.modules_to_save.default.bias",
        )
    }


@peft_asks_for_an_old_name
def test_lora_on_embeddings():
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["word_embeddings", "query"])
    groups = layer_groups(get_peft_model(tiny_bert(), config))
    name = "base_model.model.bert.embeddings.word_embeddings.lora_embedding_A.default"
    assert groups.index_of(name) == 0


@peft_asks_for_an_old_name
def test_lora_makes_no_blocks_of_a_list_of_embeddings():
    lists = r".*(xpath_(tag|subs)_sub_embeddings\.\d+|query)"
    model = get_peft_model(tiny_model("markuplm"), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=lists))
    assert layer_groups(model).names == layer_groups(tiny_model("markuplm")).names


@peft_asks_for_an_old_name
def test_virtual_tokens_go_with_the_embeddings():
    model = get_peft_model(tiny_bert(), PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
    groups = layer_groups(model)
    assert groups.names == BERT_NAMES
    assert groups.index_of("prompt_encoder.default.embedding.weight") == 0
    # PEFT registers the word embeddings a second time, behind the head; they are frozen when their tensor is.
    assert groups[0].module_names == ("prompt_encoder", "base_model.bert.embeddings", "word_embeddings")


# ------------------------------------------------------------------------------------------------ one's own models


class LanguageModel(nn.Module):
    """A head tied to the embeddings, and a final norm registered before the blocks."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(2, 5, bias=False)
        self.norm = nn.LayerNorm(2)
        self.start = nn.Parameter(torch.zeros(2))
        self.blocks = stack()
        self.embed = nn.Embedding(5, 2)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        count, width = len(self.blocks), self.norm.weight.numel()
        x = self.embed(ids) + self.start[:width]
        for block in self.blocks[:count]:
            x = block(x)
        return self.lm_head(self.norm(x))


def test_tied_head_counts_once_at_its_first_use():
    model = LanguageModel()
    groups = layer_groups(model)
    assert groups.names == ["embeddings", "layer.0", "layer.1", "head"]
    assert groups[0].parameter_names == ("start", "lm_head.weight")  # its name in named_parameters
    assert groups[0].module_names == ("embed", "lm_head")
    assert groups[-1].parameter_names == ("norm.weight", "norm.bias")


def test_one_block_in_several_places():
    model = LanguageModel()
    model.blocks.append(model.blocks[0])
    assert layer_groups(model).names == ["embeddings", "layer.0", "layer.1", "head"]


def test_blocks_of_the_same_tensors():
    model = LanguageModel()
    model.blocks[1].inner.weight, model.blocks[1].inner.bias = model.blocks[0].inner.weight, model.blocks[0].inner.bias
    assert modules(model) == {
        "embeddings": ("embed", "lm_head"),
        "layer.0": ("blocks.0", "blocks.1"),
        "head": ("norm",),
    }


def test_one_module_under_two_names():
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = LanguageModel()
            self.blocks = self.body.blocks

        def forward(self, ids):
            return self.body(ids)

    assert modules(Aliased()) == {
        name: tuple(f"body.{path}" for path in paths) for name, paths in modules(LanguageModel()).items()
    }


def test_lists_of_different_lengths_in_one_loop():
    class EveryOther(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.adapters = stack(4), stack(2)

        def forward(self, x):
            for index, block in enumerate(self.blocks):
                x = self.adapters[index // 2](block(x))
            return x

    names = layer_groups(EveryOther()).names
    assert names == [*(f"blocks.layer.{index}" for index in range(4)), "adapters.layer.0", "adapters.layer.1"]


class LongDocuments(nn.Module):
    """Two stacks of which one is a transformers model, the other recurrent, as for AWD-LSTM."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Sequential(nn.Sequential(nn.Linear(16, 2), nn.ReLU()), Block())  # a network, no stack
        self.encoder = tiny_bert(num_hidden_layers=2).bert
        self.rnns = nn.ModuleList([nn.LSTM(16, 16), nn.LSTM(16, 16)])

    def forward(self, chunks):
        x = torch.stack([self.encoder(chunk).last_hidden_state[:, 0] for chunk in chunks])
        for rnn in self.rnns:
            x, _ = rnn(x)
        return self.classifier(x[-1])


def test_two_stacks_are_told_apart():
    model = LongDocuments()
    model.encoder.pooler = None  # it would begin the head
    assert modules(model) == {
        "embeddings": ("encoder.embeddings",),
        "encoder.layer.0": ("encoder.encoder.layer.0",),
        "encoder.layer.1": ("encoder.encoder.layer.1",),
        "rnns.layer.0": ("rnns.0",),
        "rnns.layer.1": ("rnns.1",),
        "head": ("classifier",),
    }


def test_the_head_begins_at_the_pooler():
    found = modules(LongDocuments())
    assert list(found) == ["embeddings", "encoder.layer.0", "encoder.layer.1", "head"]
    assert found["head"] == ("encoder.pooler", "rnns.0", "rnns.1", "classifier")


def test_stacks_of_one_parent():
    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.early = nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block())

        def forward(self, x):
            return self.late(self.early(x))

    assert layer_groups(Stages()).names == ["early.layer.0", "early.layer.1", "late.layer.0", "late.layer.1"]


def test_without_a_stack_each_child_is_a_group():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(2, 2)
            self.shift = nn.Parameter(torch.zeros(2))
            self.embed = nn.EmbeddingBag(5, 2)

        def forward(self, ids):
            return self.out(self.embed(ids) + self.shift)

    model = nn.DataParallel(Bag())
    assert layer_groups(model).names == ["embed", "out"]
    assert layer_groups(model)[1].parameter_names == ("module.shift", "module.out.weight", "module.out.bias")
    assert layer_groups(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))).names == ["0", "2"]
    assert [group.parameter_names for group in layer_groups(nn.Linear(2, 2))] == [("weight", "bias")]


def test_without_a_source_names_and_registration_decide():
    namespace = {"nn": nn, "stack": stack}
    exec(
        "class Typed(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.classifier = nn.Linear(2, 2)\n"
        "        self.embed = nn.Embedding(5, 2)\n"
        "        self.blocks = stack()\n"
        "        self.norms = nn.ModuleList([nn.LayerNorm(2), nn.LayerNorm(2)])\n"
        "        self.final = nn.LayerNorm(2)\n"
        "    def forward(self, x): ...\n",
        namespace,
    )
    assert modules(namespace["Typed"]()) == {
        "embeddings": ("embed",),
        "layer.0": ("blocks.0", "norms.0"),
        "layer.1": ("blocks.1", "norms.1"),
        "head": ("final", "classifier"),
    }
