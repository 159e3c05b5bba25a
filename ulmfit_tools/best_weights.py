"""The weights of the best evaluations of a run, kept in its folder so that a later stage can start from them.

One file for each step. A file is needed as long as some checkpoint may be resumed that counts on it, so the run keeps
the best one of now and the best one as of each checkpoint that is still there.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ulmfit_tools.errors import InputError

FOLDER = "_best-weights"  # Trainer pushes nothing to the Hub whose name begins with an underscore


def weights_file(run_folder: str | Path, step: int) -> Path:
    """Where the weights of a step are kept."""
    return Path(run_folder) / FOLDER / f"step-{step:09d}.safetensors"


def save_weights(model: nn.Module, path: Path, fixed: Collection[str] = ()) -> None:
    """Write a model's parameters and buffers; the file appears whole or not at all.

    Args:
        model: The model.
        path: The file; an older one is replaced.
        fixed: The names of parameters that never change, and are left out.
    """
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in _tensors(model).items()
        if name not in fixed
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    save_file(tensors, aside)
    with open(aside, "rb") as written:
        os.fsync(written.fileno())
    os.replace(aside, path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy saved weights into a model, in place: the optimizer and other wrappers keep their references.

    Raises:
        InputError: There is no such file.
    """
    if not path.is_file():
        raise InputError(f'The best weights of an earlier stage are gone; put back the file. Received: "{path}"')
    tensors = _tensors(model)
    with torch.no_grad():
        for name, saved in load_file(path).items():
            tensors[name].copy_(saved)


def checkpoint_steps(run_folder: str | Path) -> list[int]:
    """The steps of Trainer's checkpoints in a folder."""
    found = (re.fullmatch(r"checkpoint-(\d+)", entry.name) for entry in Path(run_folder).iterdir())
    return sorted(int(match[1]) for match in found if match)


def needed_steps(
    history: list[dict[str, Any]], checkpoints: Iterable[int], best_of: Callable[[list[dict[str, Any]]], int | None]
) -> set[int]:
    """The steps whose weights may still be asked for: the best one now, and as of each checkpoint.

    A checkpoint of the last step of an epoch can be older or younger than the evaluation of the same step, so both
    are reckoned with.
    """
    found = {best_of(history)}
    for at in checkpoints:
        found.add(best_of([entry for entry in history if entry["step"] <= at]))
        found.add(best_of([entry for entry in history if entry["step"] < at]))
    return {step for step in found if step is not None}


def remove_weights(run_folder: str | Path, keep: Collection[int]) -> None:
    """Delete the weights of all steps but these."""
    wanted = {weights_file(run_folder, step) for step in keep}
    for path in (Path(run_folder) / FOLDER).glob("step-*.safetensors"):
        if path not in wanted:
            path.unlink()


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
