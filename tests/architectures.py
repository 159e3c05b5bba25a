"""A tiny model of every architecture that transformers can classify sequences with, built from its own config."""

import inspect

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

MODEL_CLASSES = dict(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
NEEDS_A_PACKAGE = {"layoutlmv2"}  # detectron2
ARCHITECTURES = sorted(MODEL_CLASSES.keys() - NEEDS_A_PACKAGE)

# What configs call the same thing, and its tiny value.
SIZES = {
    32: "hidden_size d_model n_embd dim emb_dim embedding_size input_embedding_size d_latents "
    "output_embedding_size pronunciation_embed_dim shape_embed_dim attention_hidden_size "
    "intra_bottleneck_size entity_emb_size out_hidden_size prediction_head_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_key_value_heads num_kv_heads n_routed_experts num_experts num_local_experts n_mamba_heads",
    8: "head_dim d_kv d_head attention_head_size attention_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim "
    "index_head_dim linear_key_head_dim linear_value_head_dim kv_channels",
    64: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff d_inner dff hidden_dim "
    "ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size feed_forward_size "
    "max_position_embeddings n_positions max_seq_len num_hash_buckets",
    3: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers",
    16: "kv_lora_rank q_lora_rank mamba_dt_rank mamba_d_state adapter_rank image_size",
    100: "vocab_size entity_vocab_size pronunciation_vocab_size shape_vocab_size",
}
TINY = {name: value for value, names in SIZES.items() for name in names.split()}

# The other special tokens lie outside of the tiny vocabulary by default.
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "cls_token_id": 1}
SEQUENCE = [1, 5, 6, 7, 8, 9, 10, 2]  # ends with the end token, which BART and T5 classify at

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HYBRID = ["linear_attention", "full_attention", "linear_attention"]
OVERRIDES: dict[str, dict] = {
    "axk1": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    "axk2": {"num_experts_per_tok": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "esm": {"vocab_size": 100},
    "funnel": {"block_sizes": [3, 3]},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "gptj": {"rotary_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lilt": {"channel_shrink_ratio": 4, "hidden_size": 96},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 4},
    "perceiver": {"num_blocks": 2, "num_self_attends_per_block": 3},
    "qwen3_5": {"text_config": {"layer_types": HYBRID}},
    "qwen3_5_text": {"layer_types": HYBRID},
    "qwen3_moe": {"num_experts_per_tok": 2},
    "qwen3_next": {"layer_types": HYBRID, "num_experts_per_tok": 2},
    "reformer": {"attn_layers": ["local", "lsh", "local"], "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
    },
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3},
}


def tiny_config(config_class: type[PreTrainedConfig], **overrides) -> PreTrainedConfig:
    """A config with every size that `TINY` names shrunk, its own configs inside too.

    Args:
        config_class: The class to build.
        overrides: Settings that win; those of a config inside are given as a dictionary under its name.
    """
    default = config_class()
    accepted = inspect.signature(config_class.__init__).parameters.keys() | config_class.attribute_map.keys()
    settings = {name: TINY[name] for name in accepted & TINY.keys() if getattr(default, name) is not None} | TOKENS
    for name, inner_class in config_class.sub_configs.items():
        inner = getattr(default, name, None)
        if isinstance(inner, PreTrainedConfig):
            settings[name] = tiny_config(type(inner), **overrides.pop(name, {}))
    return config_class(**(settings | overrides))


def tiny_model(model_type: str, **overrides) -> PreTrainedModel:
    """A classifier of three classes; the same weights each time."""
    config = tiny_config(CONFIG_MAPPING[model_type], num_labels=3, **OVERRIDES.get(model_type, {}), **overrides)
    torch.manual_seed(0)
    return getattr(transformers, MODEL_CLASSES[model_type])(config).eval()


def tiny_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """One short text as token ids."""
    return {"inputs" if model.main_input_name == "inputs" else "input_ids": torch.tensor([SEQUENCE])}


class _FirstUses(TorchFunctionMode):
    """Counts the calls of torch's functions, and notes at which one each parameter is first an argument."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.first: dict[str, int] = {}
        self.calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        result = function(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):  # not its dtype or shape
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self.names:
                    self.first.setdefault(self.names[id(leaf)], self.calls)
        return result


def first_uses(model: PreTrainedModel) -> dict[str, int]:
    """When a real forward pass first uses each parameter: its name -> the number of the call; without the unused."""
    with torch.no_grad(), _FirstUses(model) as uses:
        model(**tiny_inputs(model))
    return uses.first
