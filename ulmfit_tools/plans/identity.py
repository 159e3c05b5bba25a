"""What identifies the data and the model of a run, wherever they lie and however their paths are spelt."""

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ulmfit_tools.data import TextClassificationData
from ulmfit_tools.layers import LayerGroups


def describe_data(data: TextClassificationData) -> dict[str, Any]:
    """What the data is: what people want to know of it, causes before what follows from them; a hash of its rows."""
    return {
        "source": data.source,
        "text_columns": list(data.text_columns),
        "label_column": data.label_column,
        "label_names": list(data.label_names),
        "rows": {name: len(split) for name, split in data.splits.items()},
        "fingerprint": data.fingerprint,
    }


def describe_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, groups: LayerGroups) -> dict[str, Any]:
    """What a model is, wherever it lies: weights, configuration and tokenizer."""
    elsewhere = ("_name_or_path", "transformers_version")
    return {
        "fingerprint": _fingerprint(model),
        "config": {key: value for key, value in model.config.to_dict().items() if key not in elsewhere},
        "tokenizer": _tokenizer_fingerprint(tokenizer),
        "groups": list(groups.names),
    }


def _fingerprint(model: PreTrainedModel) -> str:
    """sha256 over names and bytes of all weights: the start of the run, to the bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over all that decides into which tokens a text is split; how they are cut and padded is the run's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        content = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    known = [type(tokenizer).__name__, tokenizer.model_max_length, content]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()
