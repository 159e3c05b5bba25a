"""The layer groups of every architecture that transformers can classify sequences with."""

import fnmatch

import pytest
import torch
from architectures import ARCHITECTURES, MODEL_CLASSES, NEEDS_A_PACKAGE, first_uses, tiny_model
from torch import nn

from ulmfit_tools.layers import layer_groups

BLOCKS = 3  # of every tiny stack
ENCODER_DECODERS = {"bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "t5gemma", "t5gemma2", "umt5"}
VISION = {"gemma3": "vision_tower", "modernvbert": "vision_model", "qwen3_5": "visual", "ultravbert": "vision_model"}


def stack(blocks: int = BLOCKS, prefix: str = "") -> list[str]:
    return [f"{prefix}layer.{index}" for index in range(blocks)]


BLOCK_NAMES = {
    "albert": stack(1),  # called three times
    "canine": [*stack(1, "initial_char_encoder."), *stack(prefix="encoder.")],
    "funnel": stack(6),  # a list of two lists
    "zamba": stack(6),
    "zamba2": stack(6),
    **{name: [*stack(prefix="encoder."), *stack(prefix="decoder.")] for name in ENCODER_DECODERS},
}

# What a text alone does not reach: pixels, table cells and entities; contacts of proteins; XLNet's masks and segments.
UNUSED = {
    "esm": "esm.contact_head.*",
    "gemma3": "model.vision_tower.*|model.multi_modal_projector.*",
    "layoutlmv3": "layoutlmv3.cls_token|layoutlmv3.p*|layoutlmv3.norm.*|layoutlmv3.LayerNorm.*",
    "luke": "luke.entity_embeddings.*|*.w2e_query.*|*.e2w_query.*|*.e2e_query.*",
    "markuplm": "*.xpath_unitseq2_embeddings.*",
    "modernvbert": "model.vision_model.*|model.connector.*",
    "qwen3_5": "model.visual.*",
    "t5gemma2": "model.encoder.vision_tower.*|model.encoder.multi_modal_projector.*",
    "ultravbert": "model.vision_model.*|model.connector.*",
    "xlnet": "*.mask_emb|*.r_s_bias|*.seg_embed",
}
# The adapters of Zamba2 lie inside of the block that its layers share, one for each layer.
LATER_THAN_THEIR_BLOCK = {"zamba2": "*_adapter_list.*"}


def matches(name: str, patterns: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split("|"))


def test_the_sweep_covers_the_mapping():
    assert len(MODEL_CLASSES) >= 127  # grows with transformers; fewer would mean that the mapping has moved
    assert set(ARCHITECTURES) | NEEDS_A_PACKAGE == MODEL_CLASSES.keys()


def assert_follows_the_forward_pass(model: nn.Module, unused: str = "", later: str = "") -> None:
    """Each parameter is first used after all those of the group before; all are used but those that match `unused`."""
    groups = layer_groups(model)
    first = first_uses(model)
    names = [name for group in groups for name in group.parameter_names]
    assert [name for name in names if name not in first and not matches(name, unused)] == []
    last_before, previous = 0, "input"
    for group in groups:
        uses = {name: first[name] for name in group.parameter_names if name in first and not matches(name, later)}
        earliest = min(uses, key=uses.get)
        assert uses[earliest] > last_before, f"{earliest} of {group.name} runs before the end of {previous}"
        last_before, previous = max(uses.values()), group.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_groups_follow_a_real_forward_pass(architecture):
    model = tiny_model(architecture)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    groups = layer_groups(model)
    held = [name for group in groups for name in group.parameter_names]
    assert sorted(held) == sorted(name for name, _ in model.named_parameters())  # a partition: each once
    assert groups.names == ["embeddings", *BLOCK_NAMES.get(architecture, stack()), "head"]
    assert_follows_the_forward_pass(model, UNUSED.get(architecture, ""), LATER_THAN_THEIR_BLOCK.get(architecture, ""))


@pytest.mark.parametrize("architecture", ["bart", "bert", "funnel", "gemma3", "xlm", "zamba"])
def test_groups_are_the_same_on_the_meta_device(architecture):
    with torch.device("meta"):
        model = tiny_model(architecture)
    assert next(model.parameters()).is_meta
    assert layer_groups(model) == layer_groups(tiny_model(architecture))


# --------------------------------------------------------------------------------------- the hard ones, one by one


def modules(architecture: str, **overrides) -> dict[str, tuple[str, ...]]:
    """The modules of each group."""
    return {group.name: group.module_names for group in layer_groups(tiny_model(architecture, **overrides))}


def test_albert_one_shared_block():
    assert modules("albert") == {
        "embeddings": ("albert.embeddings", "albert.encoder.embedding_hidden_mapping_in"),
        "layer.0": ("albert.encoder.albert_layer_groups.0",),
        "head": ("albert.pooler", "classifier"),
    }
    assert list(modules("albert", num_hidden_groups=3)) == ["embeddings", *stack(3), "head"]


def test_funnel_list_of_lists():
    found = modules("funnel")
    assert found["layer.2"] == ("funnel.encoder.blocks.0.2",)
    assert found["layer.3"] == ("funnel.encoder.blocks.1.0",)


@pytest.mark.parametrize("architecture", ["xlm", "flaubert"])
def test_xlm_four_parallel_lists(architecture):
    lists = ("attentions", "layer_norm1", "ffns", "layer_norm2")
    assert modules(architecture) == {
        "embeddings": tuple(f"transformer.{name}" for name in ("embeddings", "position_embeddings", "layer_norm_emb")),
        **{f"layer.{index}": tuple(f"transformer.{name}.{index}" for name in lists) for index in range(BLOCKS)},
        "head": ("sequence_summary",),
    }


def test_markuplm_longest_list_is_embeddings():
    model = tiny_model("markuplm")
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    assert max(lists, key=lists.get).startswith("markuplm.embeddings.")
    assert modules("markuplm")["embeddings"] == ("markuplm.embeddings",)


@pytest.mark.parametrize("architecture", sorted(ENCODER_DECODERS))
def test_encoder_decoders_encoder_first(architecture):
    groups = layer_groups(tiny_model(architecture))
    assert groups.names == ["embeddings", *stack(prefix="encoder."), *stack(prefix="decoder."), "head"]
    for group in groups[1:-1]:
        side, _, index = group.name.split(".")
        assert f".{side}." in group.module_names[-1]
        assert group.module_names[-1].endswith(f".{index}")


def test_bart_what_runs_between_encoder_and_decoder():
    assert modules("mbart")["decoder.layer.0"] == (
        "model.encoder.layer_norm",
        "model.decoder.embed_positions",
        "model.decoder.layernorm_embedding",  # registered after the layers
        "model.decoder.layers.0",
    )
    assert modules("mbart")["head"] == ("model.decoder.layer_norm", "classification_head")


@pytest.mark.parametrize("architecture", ["bart", "t5", "mt5"])
def test_tied_embeddings_count_once(architecture):
    model = tiny_model(architecture)
    shared = next(name for name, _ in model.named_parameters() if name.endswith("shared.weight"))
    embeddings = layer_groups(model)[0]
    assert shared in embeddings.parameter_names
    assert embeddings.module_names[-1].endswith("decoder.embed_tokens")  # frozen with its tensor


def test_zamba_tensors_shared_across_modules():
    # Layers 1, 3 and 5 each hold a transformer of their own, of the same tensors.
    model = tiny_model("zamba")
    layers = model.model.layers
    assert layers[3].shared_transf is not layers[1].shared_transf
    assert layers[3].shared_transf.self_attn.q_proj.weight is layers[1].shared_transf.self_attn.q_proj.weight
    groups = layer_groups(model)
    assert groups.index_of("model.layers.1.shared_transf.self_attn.q_proj.weight") == groups.names.index("layer.1")
    assert not any("shared_transf" in name for name in groups[groups.names.index("layer.3")].parameter_names)
    assert groups[groups.names.index("layer.3")].module_names == ("model.layers.3",)


def test_deberta_relative_positions_shared_by_all_layers():
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    assert modules("deberta", **relative)["embeddings"] == ("deberta.embeddings", "deberta.encoder.rel_embeddings")
    # The table is read before the first block, and first multiplied inside of it.
    assert_follows_the_forward_pass(tiny_model("deberta", **relative), later="*.rel_embeddings.*")

    relative |= {"norm_rel_ebd": "layer_norm", "conv_kernel_size": 3}
    found = modules("deberta-v2", **relative)
    assert found["embeddings"] == (
        "deberta.embeddings",
        "deberta.encoder.rel_embeddings",
        "deberta.encoder.LayerNorm",  # of the table, not of the layers
    )
    assert found["layer.0"] == ("deberta.encoder.layer.0", "deberta.encoder.conv")  # runs once, after the first block
    assert found["head"] == ("pooler", "classifier")
    assert_follows_the_forward_pass(tiny_model("deberta-v2", **relative))


def test_mpnet_relative_positions_shared_by_all_layers():
    assert modules("mpnet")["embeddings"] == ("mpnet.embeddings", "mpnet.encoder.relative_attention_bias")


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("camembert", ("classifier",)),
        ("gte", ("gte.pooler", "classifier")),
        ("nomic_bert", ("nomic_bert.pooler", "classifier")),
        ("opt", ("model.decoder.final_layer_norm", "score")),
        ("t5gemma", ("model.decoder.norm", "score")),
        ("xlm-roberta", ("classifier",)),
    ],
)
def test_head_registered_before_the_blocks(architecture, head):
    names = [name for name, _ in tiny_model(architecture).named_modules()]
    assert names.index(head[0]) < max(index for index, name in enumerate(names) if name.endswith(".0"))
    assert modules(architecture)["head"] == head


def test_opt_projections_around_the_blocks():
    found = modules("opt", word_embed_proj_dim=16)
    assert "model.decoder.project_in" in found["embeddings"]
    assert found["head"] == ("model.decoder.final_layer_norm", "model.decoder.project_out", "score")
    assert_follows_the_forward_pass(tiny_model("opt", word_embed_proj_dim=16))


@pytest.mark.parametrize(("architecture", "tower"), VISION.items())
def test_vision_tower_belongs_to_the_embeddings(architecture, tower):
    embeddings = layer_groups(tiny_model(architecture))[0]
    assert embeddings.module_names[0] == f"model.{tower}"
    assert any(name.startswith(f"model.{tower}.") for name in embeddings.parameter_names)
    assert any("embeddings" in name or "embed_tokens" in name for name in embeddings.module_names[1:])


def test_a_model_with_vision_has_the_groups_of_its_text_sibling():
    assert list(modules("gemma3")) == list(modules("gemma3_text"))


def test_canine_block_after_the_pooler():
    assert modules("canine") == {
        "embeddings": ("canine.char_embeddings",),
        "initial_char_encoder.layer.0": ("canine.initial_char_encoder.layer.0",),
        "encoder.layer.0": ("canine.chars_to_molecules", "canine.encoder.layer.0"),
        "encoder.layer.1": ("canine.encoder.layer.1",),
        "encoder.layer.2": ("canine.encoder.layer.2",),
        "head": ("canine.pooler", "canine.projection", "canine.final_char_encoder.layer.0", "classifier"),
    }


def test_perceiver_cross_attention_around_the_blocks():
    found = modules("perceiver")
    assert found["embeddings"] == (
        "perceiver.input_preprocessor",
        "perceiver.embeddings",
        "perceiver.encoder.cross_attention",
    )
    assert found["layer.0"] == ("perceiver.encoder.self_attends.0",)
    assert found["head"] == ("perceiver.decoder",)


def test_bare_parameters_outside_of_any_block():
    assert layer_groups(tiny_model("xlnet")).index_of("transformer.mask_emb") == 0
    groups = layer_groups(tiny_model("layoutlmv3"))
    assert [groups.index_of(f"layoutlmv3.{name}") for name in ("cls_token", "pos_embed", "norm.weight")] == [0, 0, 0]
    assert groups.index_of("layoutlmv3.encoder.rel_pos_bias.weight") == 0  # registered after the layers
