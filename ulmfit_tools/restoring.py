"""Runs that leave no trace: what a trial training changes in this process is put back to the bit."""

import copy
import functools
import gc
import logging
import random
import signal
import sys
import tempfile
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState, PartialState
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

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

    That is: the values of buffers and of parameters that are trainable, or are thawed before a step of an optimizer
    changes them; gradients, `requires_grad`, modes, hooks and any other attribute of the modules; an optimizer's
    state, rates and schedule; the random numbers of Python, NumPy and torch on every device, and those of every
    generator of Python and NumPy, and of torch in a variable of a module of Python, in this process. Of the weights
    that train there is one copy; of frozen ones there is none, and a warning if anything else than an optimizer has
    changed them. An optimizer's state waits where that copy is, not on its device. An interrupt (Ctrl-C) that comes
    while things are put back waits for it.

    Args:
        model: The model as it is inside DDP and other wrappers.
        optimizer: An optimizer that exists already, with those inside it. In the block they start without state, as
            new ones do.
        holders: Objects that are put back too, as a trainer with its collator and its datasets, with the Python
            objects and modules that they hold in turn, as the modules' own helpers are: their attributes, random
            generators, lists, dictionaries and sets. Not put back are numbers that change inside a tensor or an array
            which is no parameter and no buffer, attributes in `__slots__`, iterators, how often a NumPy generator has
            spawned others, modules and torch's generators in containers of more than 32 elements, other optimizers,
            data loaders themselves, and callbacks.
        offload_folder: Keep the copy, and the optimizer's state, in temporary files in this folder; by default they
            are in the host's memory.

    Yields:
        A function that goes back to the beginning at once, for another run inside the same block.
    """
    held = _held(model, holders)
    modules = [each for each in held if isinstance(each, nn.Module)]
    parameters = {id(parameter): parameter for module in modules for parameter in module.parameters(recurse=False)}
    buffers = {id(buffer): buffer for module in modules for buffer in module.buffers(recurse=False)}
    optimizers = [] if optimizer is None else _with_inner(optimizer)
    restores = [_random_numbers(), _gradient_sync(), *map(_in_place, held), *map(_attributes, filter(_is_plain, held))]
    restores += [_gradients(parameters.values()), *map(_optimizer, optimizers)]

    def forget() -> None:
        for one in optimizers:
            one.state = defaultdict(dict)

    def rewind() -> None:
        for restore in reversed(restores):
            restore()
        forget()

    with _tensors(parameters, buffers, offload_folder) as restore_tensors, ExitStack() as at_end:
        restores.append(restore_tensors)
        for restore in restores:  # on a stack, so that each has its turn also when another one raises
            at_end.callback(restore)
        at_end.enter_context(_state_away(optimizers, offload_folder))
        forget()
        try:
            yield rewind
        finally:
            with _interrupts_wait():
                at_end.close()


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C have its effect after the block: people press it twice."""
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def _copies(tensors: dict[Any, torch.Tensor], offload_folder: str | Path | None) -> Iterator[dict[Any, torch.Tensor]]:
    """Copies of tensors in the host's memory, or in a file as long as the block lasts."""
    if offload_folder is None:
        yield {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        return
    with tempfile.TemporaryDirectory(dir=offload_folder) as folder:
        file = Path(folder, "tensors.pt")
        torch.save({name: tensor.detach() for name, tensor in tensors.items()}, file)
        yield torch.load(file, map_location="cpu", mmap=True, weights_only=True)


@contextmanager
def _tensors(
    parameters: dict[int, nn.Parameter], buffers: dict[int, torch.Tensor], offload_folder: str | Path | None
) -> Iterator[Restore]:
    tensors: dict[int, torch.Tensor] = {}
    saved: dict[int, torch.Tensor] = {}
    with ExitStack() as stack:

        def keep(new: dict[int, torch.Tensor]) -> None:
            if new:
                saved.update(stack.enter_context(_copies(new, offload_folder)))
                tensors.update(new)

        def trainable(those: Iterable[nn.Parameter]) -> dict[int, torch.Tensor]:
            return {id(one): one for one in those if one.requires_grad and id(one) not in tensors}

        def keep_stepped(optimizer: Optimizer, *_: Any) -> None:
            """A trainer's own step may thaw layers, and its optimizer may train what the trainer does not hold."""
            stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            keep(trainable([*parameters.values(), *stepped]))

        keep(trainable(parameters.values()) | buffers)
        frozen = [one for key, one in parameters.items() if key not in tensors]
        versions = [one._version for one in frozen]
        stack.callback(register_optimizer_step_pre_hook(keep_stepped).remove)

        @torch.no_grad()
        def restore() -> None:
            for key, tensor in tensors.items():
                tensor.copy_(saved[key])

        yield restore
        changed = sum(
            one._version != version and id(one) not in tensors for one, version in zip(frozen, versions, strict=True)
        )
        if changed and PartialState().num_processes == 1:  # DDP sends every process the weights that it has already
            logger.warning(
                f"{changed} frozen parameters were changed by something else than an optimizer and are not put back, "
                "as there is no copy of what is frozen. One is kept of parameters with requires_grad=True."
            )


@contextmanager
def _state_away(optimizers: Iterable[Optimizer], offload_folder: str | Path | None) -> Iterator[None]:
    """Take the tensors of optimizers' states from where they are; the same tensors get their numbers back.

    A training without them makes its own, and there is not always room for both on a device. Left where they are:
    what is in the host's memory already and is to stay there, parts of larger tensors, and special kinds of tensors,
    as those that bitsandbytes pages.
    """
    states = [values for optimizer in optimizers for values in optimizer.state.values() if isinstance(values, dict)]
    tensors = {
        id(value): value
        for values in states
        for value in values.values()
        if type(value) is torch.Tensor
        and not hasattr(value, "is_paged")
        and value.nbytes == value.untyped_storage().nbytes()
        and (offload_folder is not None or value.device.type != "cpu")
    }
    if not tensors:
        yield
        return
    devices = {key: tensor.device for key, tensor in tensors.items()}
    with _copies(tensors, offload_folder) as saved:
        try:
            for key, tensor in tensors.items():
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=devices[key])
            yield
        finally:
            for key, tensor in tensors.items():
                tensor.data = saved[key].to(devices[key], copy=True)


def _gradients(parameters: Iterable[nn.Parameter]) -> Restore:
    """And what is trainable. Training sets gradients to None and makes new ones, so these tensors need no copy."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]

    def restore() -> None:
        for parameter, requires_grad, gradient in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient

    return restore


def _with_inner(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and those that it steps in turn, as sharpness-aware and lookahead ones do."""
    inner = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    return [optimizer, *(each for one in inner for each in _with_inner(one))]


def _optimizer(optimizer: Optimizer) -> Restore:
    restore_attributes = _attributes(optimizer)  # a schedule patches `step`, and Accelerate replaces the groups
    groups = [(group, dict(group)) for group in optimizer.param_groups]

    def restore() -> None:
        restore_attributes()
        for group, values in groups:
            group.clear()
            group.update(values)

    return restore


# What is handled elsewhere or looks after itself: locks, threads, loggers; Accelerate's state is one for the process.
_LEFT_ALONE = (Optimizer, LRScheduler, torch.Tensor, TrainerCallback, type, ModuleType)
_FOREIGN = {*sys.stdlib_module_names, "accelerate"} - {"types", "argparse"}  # these two have namespaces
_FEW = 32  # elements of a container that are looked at one by one: helpers; more are rows


def _held(model: nn.Module, holders: Iterable[Any]) -> list[Any]:
    """The model, other objects, and those that they hold, by attributes and in small containers; each once."""
    found: dict[int, Any] = {}
    ahead = [model, *holders]
    while ahead:
        value = ahead.pop()
        if _wraps(value, model):
            ahead += value.children()
        elif id(value) not in found and not isinstance(value, _LEFT_ALONE):
            found[id(value)] = value
            ahead += _parts(value)
    return [*found.values()]


def _wraps(value: Any, model: nn.Module) -> bool:
    """Whether it is what a distributed or compiled run has put around the model, and looks after itself."""
    library = type(value).__module__.partition(".")[0] in ("torch", "accelerate")
    inside = value.modules() if library and isinstance(value, nn.Module) else ()
    return value is not model and any(module is model for module in inside)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, nn.Module):
        return [*value.children(), *filter(_is_plain, vars(value).values())]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, DataLoader):  # its own attributes are those of its workers
        return [value.dataset, value.collate_fn, value.sampler, value.batch_sampler, value.generator]
    parts = [*vars(value).values()] if _is_plain(value) else []
    if isinstance(value, FunctionType):  # of what is around it, only what `gc` does not know of: lists may be notes
        around = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        parts += [each for each in around if isinstance(each, torch.Generator)]
    if isinstance(value, (dict, list, tuple, set, deque)) and len(value) <= _FEW:
        parts += value.values() if isinstance(value, dict) else value
    return parts


def _is_plain(value: Any) -> bool:
    """Whether it is a Python object whose attributes are its own business."""
    if isinstance(value, DataLoader):
        return False
    own = isinstance(value, FunctionType) or type(value).__module__.partition(".")[0] not in _FOREIGN
    return own and isinstance(getattr(value, "__dict__", None), dict)


def _attributes(holder: Any) -> Restore:
    """An object's attributes, and what changes in place in their values."""
    own = getattr(holder, "__dict__", None)
    if not isinstance(own, dict):
        return lambda: None
    kept = dict(own)
    restores = [_in_place(value) for value in kept.values()]

    def restore() -> None:
        own.update(kept)
        for name in own.keys() - kept.keys():
            del own[name]
        for restore_one in restores:
            restore_one()

    return restore


def _in_place(value: Any) -> Restore:
    """The elements of a container, the state of a random generator; nothing for any other value."""
    standard = type(value).__module__ in ("builtins", "collections")  # others may refuse to be changed
    if not standard or not isinstance(value, (dict, list, set, deque)):
        return _generator(value)
    kept = dict(value) if isinstance(value, dict) else list(value)
    add: Any = value.extend if isinstance(value, (list, deque)) else value.update

    def restore() -> None:
        value.clear()
        add(kept)

    return restore


def _generator(value: Any) -> Restore:
    """The state of a random generator; nothing for any other value."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, np.random.Generator):
        return _generator(value.bit_generator)
    if isinstance(value, np.random.BitGenerator):
        bits = copy.deepcopy(value.state)
        return lambda: setattr(value, "state", bits)
    if isinstance(value, np.random.RandomState):
        words = value.get_state()
        return lambda: value.set_state(words)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):  # which has no state
        internal = value.getstate()
        return lambda: value.setstate(internal)
    return lambda: None


def _random_numbers() -> Restore:
    """The libraries' own generators, and whatever others there are, as in the variables that a collator reads."""
    in_python, in_numpy, on_host = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    on_devices = _device_random_numbers()
    kinds = (random.Random, np.random.BitGenerator, np.random.RandomState)  # `gc` does not know those of torch
    others = [value for value in gc.get_objects() if issubclass(type(value), kinds)]
    variables = (value for module in [*sys.modules.values()] for value in [*getattr(module, "__dict__", {}).values()])
    others += [value for value in variables if issubclass(type(value), torch.Generator)]
    restores = [_generator(value) for value in others]

    def restore() -> None:
        for restore_one in restores:
            restore_one()
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


@contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """Random numbers of torch, after which it goes on as if it had drawn none."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
