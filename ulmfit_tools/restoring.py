"""Runs that leave no trace: what a trial training changes in this process is put back to the bit."""

import copy
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState
from torch import nn
from torch.optim import Optimizer

Restore = Callable[[], Any]


@contextmanager
def unchanged(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    holders: Iterable[Any] = (),
    offload_folder: str | Path | None = None,
) -> Iterator[Callable[[], None]]:
    """Put back, however the `with` block ends, what a training inside it changes.

    That is: the values of trainable parameters and of buffers; gradients, `requires_grad`, modes, hooks and any other
    attribute of the modules; an optimizer's state, rates and schedule; the random numbers of Python, NumPy and torch
    on every device. Of the weights that train there is one copy; of frozen ones there is none.

    Args:
        model: The model as it is inside DDP and other wrappers.
        optimizer: An optimizer that exists already. In the block it starts without state, as a new one does.
        holders: Objects whose own attributes and random generators are put back too: a collator, a dataset.
        offload_folder: Keep the copy in a temporary file in this folder; by default it is in the host's memory.

    Yields:
        A function that goes back to the beginning at once, for another run inside the same block.
    """
    restores = [_random_numbers(), _gradient_sync(), *map(_attributes, holders), _modules(model), _gradients(model)]
    forget: Restore = lambda: None  # noqa: E731
    if optimizer is not None:
        restores.append(_optimizer(optimizer))
        forget = lambda: setattr(optimizer, "state", defaultdict(dict))  # noqa: E731
    with _tensors(model, offload_folder) as restore_tensors, ExitStack() as at_end:
        restores.append(restore_tensors)
        for restore in restores:  # on a stack, so that each has its turn also when another one raises
            at_end.callback(restore)
        forget()

        def rewind() -> None:
            for restore in reversed(restores):
                restore()
            forget()

        yield rewind


@contextmanager
def _tensors(model: nn.Module, offload_folder: str | Path | None) -> Iterator[Restore]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = trained | dict(model.named_buffers())
    with ExitStack() as stack:
        if offload_folder is None:
            saved = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        else:
            file = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=offload_folder)), "weights.pt")
            torch.save({name: tensor.detach() for name, tensor in tensors.items()}, file)
            saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)

        @torch.no_grad()
        def restore() -> None:
            for name, tensor in tensors.items():
                tensor.copy_(saved[name])

        yield restore


def _modules(model: nn.Module) -> Restore:
    configs = [getattr(model, name, None) for name in ("config", "generation_config")]
    restores = [_attributes(holder) for holder in [*model.modules(), *configs]]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for restore_one in restores:
            restore_one()
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)

    return restore


def _gradients(model: nn.Module) -> Restore:
    """Training sets them to None and makes new ones, so the tensors themselves need no copy."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]

    def restore() -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient

    return restore


def _optimizer(optimizer: Optimizer) -> Restore:
    restore_attributes = _attributes(optimizer)  # a schedule patches `step`, and Accelerate replaces the groups
    groups = [(group, dict(group)) for group in optimizer.param_groups]

    def restore() -> None:
        restore_attributes()
        for group, values in groups:
            group.clear()
            group.update(values)

    return restore


def _attributes(holder: Any) -> Restore:
    """An object's attributes, the contents of those that are dictionaries, the states of those that are generators."""
    own = getattr(holder, "__dict__", None)
    if not isinstance(own, dict):
        return lambda: None
    kept = dict(own)
    contents = [(value, dict(value)) for value in kept.values() if isinstance(value, dict)]
    generators = [_generator(value) for value in kept.values()]

    def restore() -> None:
        own.clear()
        own.update(kept)
        for value, content in contents:
            value.clear()
            value.update(content)
        for restore_one in generators:
            restore_one()

    return restore


def _generator(value: Any) -> Restore:
    """The state of a random generator; nothing for any other value."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, np.random.Generator):
        bits = copy.deepcopy(value.bit_generator.state)
        return lambda: setattr(value.bit_generator, "state", bits)
    if isinstance(value, np.random.RandomState):
        words = value.get_state()
        return lambda: value.set_state(words)
    if isinstance(value, random.Random):
        internal = value.getstate()
        return lambda: value.setstate(internal)
    return lambda: None


def _random_numbers() -> Restore:
    in_python, in_numpy, on_host = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    on_devices = _device_random_numbers()

    def restore() -> None:
        random.setstate(in_python)
        np.random.set_state(in_numpy)  # noqa: NPY002
        torch.set_rng_state(on_host)
        on_devices()

    return restore


def _device_random_numbers() -> Restore:
    if not torch.accelerator.is_available():
        return lambda: None
    devices = torch.get_device_module()
    if hasattr(devices, "get_rng_state_all"):
        states = devices.get_rng_state_all()
        return lambda: devices.set_rng_state_all(states)
    state = devices.get_rng_state()  # Apple's, of which there is one
    return lambda: devices.set_rng_state(state)


def _gradient_sync() -> Restore:
    """Accelerate's note of where it is in accumulation and which loaders are being read, one for the process."""
    shared = GradientState()
    syncs, loaders = shared.sync_gradients, shared.dataloader_references

    def restore() -> None:
        shared.sync_gradients = syncs
        shared.dataloader_references = loaders

    return restore
