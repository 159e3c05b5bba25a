"""Which layer groups train: pure functions of how far a run is, and their effect on a model.

A run goes through *stages*: `stages[k]` is the set of indices of the layer groups (input -> output) that train in
stage `k`, and `starts[k]` the update step at which it begins. Both are computed from the settings and the training
state, never accumulated, so a run that is resumed anywhere has the right layers frozen at once.
"""

import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from copy import deepcopy
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ulmfit_tools.errors import InputError
from ulmfit_tools.evaluations import evaluations, is_better
from ulmfit_tools.layers import LayerGroups, layer_groups

# ---- By hand: fastai's freeze_to -----------------------------------------------------------------------------------


def freeze_to(model: nn.Module, n: int, num_groups: int | None = None) -> list[str]:
    """Freeze the layer groups before `n` and thaw those from `n` on, as fastai's method of the same name.

    Args:
        model: The model; see `layer_groups` for its groups.
        n: The first group that trains; a negative number counts from the end, so `-1` trains only the head.
        num_groups: Merge the groups into this many first.

    Returns:
        The names of the parameters that train now. What can never train (see `fixed_parameters`) is not among them.

    Raises:
        InputError: `n` is no index of a group, or nothing from group `n` on can train.
    """
    groups = layer_groups(model, num_groups)
    if not -len(groups) <= n < len(groups):
        raise InputError(f"freeze_to takes a group from {-len(groups)} to {len(groups) - 1} here. Received: n={n}")
    trainable = range(n % len(groups), len(groups))
    if not trainable_names(model, groups, trainable):
        raise InputError(f'No parameter from group "{groups[n].name}" on can train. Received: n={n}')
    return set_trainable(model, groups, trainable)


def unfreeze(model: nn.Module) -> list[str]:
    """Thaw everything that can train.

    Returns:
        The names of the parameters that train now; for a PEFT model the adapters and `modules_to_save`.
    """
    return freeze_to(model, 0, num_groups=1)


def set_trainable(model: nn.Module, groups: LayerGroups, trainable: Collection[int]) -> list[str]:
    """Make the parameters of exactly these groups trainable, and drop the gradients of all others.

    Args:
        model: The model.
        groups: All of its layer groups.
        trainable: The indices of the groups that train.

    Returns:
        The names of the parameters that train now, in the model's order.
    """
    names = trainable_names(model, groups, trainable)
    wanted = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
        if name not in wanted:
            parameter.grad = None
    return names


def trainable_names(model: nn.Module, groups: LayerGroups, indices: Collection[int]) -> list[str]:
    """The names of the parameters that can train in some of a model's groups, in the model's order."""
    held = {name for index in indices for name in groups[index].parameter_names} - fixed_parameters(model)
    return [name for name, _ in model.named_parameters() if name in held]


# ---- What can never train ------------------------------------------------------------------------------------------


def fixed_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters that no thawing touches.

    - With PEFT adapters: everything but the active adapters, `modules_to_save` and the biases that the adapter's
      configuration trains.
    - Tensors that cannot have a gradient: quantised weights.
    - What the model's own class builds with `requires_grad=False`, such as RoFormer's sinusoidal positions.

    None of it depends on what is frozen at the moment.
    """
    parameters = dict(model.named_parameters())
    adapted = next((module for module in model.modules() if getattr(module, "peft_config", None)), None)
    if adapted is not None:
        trained = _adapter_parameters(adapted)
        return {name for name, parameter in parameters.items() if id(parameter) not in trained}
    integers = {name for name, p in parameters.items() if not (p.is_floating_point() or p.is_complex())}
    return integers | (_fixed_by_class(model) & parameters.keys())


def _adapter_parameters(model: Any) -> set[int]:
    """The ids of the parameters that PEFT trains in a model with adapters; asked of PEFT itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer, set_requires_grad

    active = model.active_adapters() if callable(model.active_adapters) else model.active_adapters
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        set_requires_grad(model, active, True)
        trained = {id(parameter) for parameter, _ in before if parameter.requires_grad}
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)

    configs = [model.peft_config[adapter] for adapter in active]
    biases = {getattr(config, "bias", "none") for config in configs}
    if "all" in biases:  # all but that of a head that is kept beside its trained copy
        kept = ".original_module."
        trained |= {id(p) for name, p in model.named_parameters() if name.endswith(".bias") and kept not in name}
    elif biases - {"none"}:  # "lora_only" and its like: the biases of the adapted layers
        layers = [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)]
        trained |= {id(layer.bias) for layer in layers if getattr(layer, "bias", None) is not None}
    if any(config.is_prompt_learning for config in configs):
        trained |= {id(p) for adapter in active for p in model.prompt_encoder[adapter].parameters()}
    return trained


def _fixed_by_class(model: nn.Module) -> set[str]:
    """What a new transformers model of the same class and configuration has with `requires_grad=False`.

    Built on the meta device: no memory, no random numbers. Other models do not say what is meant to stay fixed.
    """
    found = next(
        ((name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)), None
    )
    if found is None or not _needs_only_a_config(type(found[1])):
        return set()
    prefix, pretrained = found
    with torch.device("meta"):
        fresh = type(pretrained)(deepcopy(pretrained.config))
    start = f"{prefix}." if prefix else ""
    return {start + name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}


def _needs_only_a_config(model_class: type) -> bool:
    others = list(inspect.signature(model_class).parameters.values())[1:]
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(one.default is not one.empty or one.kind in optional for one in others)


# ---- Stages: which groups train, in which order --------------------------------------------------------------------


def unfreezing_stages(num_groups: int, *, start: int = 1, groups_per_stage: int = 1) -> list[frozenset[int]]:
    """Gradual unfreezing from the top (Howard & Ruder 2018, section 3.3): each stage adds groups below the last ones.

    Args:
        num_groups: How many layer groups there are.
        start: How many of them, counted from the head, train in the first stage.
        groups_per_stage: How many each further stage adds; the last stage adds what is left.

    Returns:
        The trainable groups of each stage; the last stage trains all. For three groups: `[{2}, {1, 2}, {0, 1, 2}]`.

    Raises:
        InputError: `start` is not from 1 to `num_groups`, or `groups_per_stage` is below 1.
    """
    if not 1 <= start <= num_groups:
        raise InputError(f"The first stage can train from 1 to {num_groups} groups. Received: start={start}")
    if groups_per_stage < 1:
        raise InputError(f"A stage adds at least 1 group. Received: groups_per_stage={groups_per_stage}")
    counts = [*range(start, num_groups, groups_per_stage), num_groups]
    return [frozenset(range(num_groups - count, num_groups)) for count in counts]


def chain_thaw_stages(num_groups: int) -> list[frozenset[int]]:
    """Chain-thaw (Felbo et al. 2017, section 3.3): the head, then each other group alone from the first on, then all.

    Returns:
        The trainable groups of each stage. For three groups: `[{2}, {0}, {1}, {0, 1, 2}]`; a single group has one.
    """
    if num_groups == 1:
        return [frozenset({0})]
    single = [num_groups - 1, *range(num_groups - 1)]
    return [*(frozenset({group}) for group in single), frozenset(range(num_groups))]


# ---- Starts: at which step each stage begins -----------------------------------------------------------------------


def regular_starts(num_stages: int, every: float, unit: float = 1) -> list[int]:
    """The steps at which stages of equal length begin.

    Args:
        num_stages: How many stages there are.
        every: The length of a stage, in units.
        unit: The length of a unit in update steps: those of an epoch, or of the whole run where `every` is a fraction.

    Returns:
        `ceil(k * every * unit)` for each stage `k`.
    """
    return [math.ceil(stage * every * unit - 1e-6) for stage in range(num_stages)]


def plateau_starts(
    history: Iterable[dict[str, Any]], num_stages: int, *, patience: int, metric: str, greater_is_better: bool
) -> list[int]:
    """The steps at which stages begin that each last until a validation metric stops improving.

    Args:
        history: `TrainerState.log_history`.
        num_stages: How many stages there are at most.
        patience: A stage ends at the evaluation that is this many after its start, or after the best one so far
            where that is later.
        metric: The name of the metric, with or without Trainer's `eval_`.
        greater_is_better: Whether the metric improves upwards.

    Returns:
        One step for each stage that has begun, the first one 0.
    """
    starts, best, waited = [0], math.nan, 0
    for step, value in evaluations(history, metric):
        if is_better(value, best, greater_is_better):
            best, waited = value, 0
        else:
            waited += 1
        if waited >= patience and len(starts) < num_stages:
            starts.append(step)
            waited = 0
    return starts


def stage_at(step: int, starts: Sequence[int]) -> int:
    """The stage of an update step: the last one that begins at it or before; `starts[0]` is 0."""
    return bisect_right(starts, step) - 1


def thaw_step(group: int, stage: int, stages: Sequence[Collection[int]], starts: Sequence[int]) -> int:
    """The step from which on a group has been training without a break, up to a stage in which it trains."""
    while stage > 0 and group in stages[stage - 1]:
        stage -= 1
    return starts[stage]


def warmup_factor(step: int, thawed_at: int, warmup_steps: int) -> float:
    """The share of its rate that a group gets: `(step - thawed_at + 1) / warmup_steps`, at most 1.

    A group that trains from the first step on (`thawed_at` 0) gets the whole of it: the schedule's own warm-up is its.
    """
    if thawed_at == 0 or step - thawed_at + 1 >= warmup_steps:
        return 1.0
    return (step - thawed_at + 1) / warmup_steps


# ---- Dropout in frozen layers --------------------------------------------------------------------------------------


def frozen_modules(model: nn.Module, groups: LayerGroups) -> list[str]:
    """The names of the outermost modules all of whose parameters are in groups in which nothing trains.

    A module that also holds layers that train is not among them, nor is its own dropout.
    """
    parameters = dict(model.named_parameters())
    frozen = {
        id(parameters[name])
        for group in groups
        if not any(parameters[name].requires_grad for name in group.parameter_names)
        for name in group.parameter_names
    }

    def search(name: str, module: nn.Module) -> list[str]:
        own = [id(parameter) for parameter in module.parameters()]
        if own and frozen.issuperset(own):
            return [name]
        start = f"{name}." if name else ""
        return [found for child, part in module.named_children() for found in search(start + child, part)]

    return search("", model)


def keep_in_eval_mode(model: nn.Module, module_names: Sequence[str]) -> Callable[[], None]:
    """Let `model.train()` leave these modules in eval mode: no dropout, no new batch statistics.

    Trainer calls `model.train()` before every step, so calling `eval()` once would not last. Works under DDP and
    `torch.compile`, which call the `train` of what they wrap.

    Args:
        model: The model whose `train` is replaced until the returned function is called.
        module_names: As in `model.named_modules()`.

    Returns:
        The function that gives `model` its own `train` back and brings the modules to the mode that it is in.
    """

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        type(self).train(self, mode)
        for name in module_names:
            self.get_submodule(name).eval()
        return self

    model.__dict__["train"] = MethodType(train, model)
    model.train(model.training)
    return partial(release_eval_mode, model)


def release_eval_mode(model: nn.Module) -> None:
    """End what `keep_in_eval_mode` began, where it did."""
    if model.__dict__.pop("train", None) is not None:
        model.train(model.training)
