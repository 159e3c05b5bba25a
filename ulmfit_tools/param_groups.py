"""Layer groups and learning rates -> the parameter groups of an optimizer.

Discriminative fine-tuning (Howard & Ruder 2018, section 3.2): layers near the input hold what is general and change
little, the head is new and learns fast, so each layer group has its own rate. `learning_rate` always means the rate
of the last group, the head.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_optimizer import has_mixed_dtensor, is_optimizer_factory
from transformers.training_args import OptimizerNames

from ulmfit_tools.errors import InputError
from ulmfit_tools.layers import layer_groups

LearningRate = float | tuple[float, float] | Sequence[float]
"""The head's rate; or a span `(low, high)` for the first and the last group; or one rate for each group."""

DEFAULT_SPREAD = 10.0
"""How many times the rate of the first group goes into the head's, where no factor is given.

The default fixes this total and derives the factor between neighbours from the number of groups, because the total is
what makes a rate too large or too small for a layer. ULMFiT's factor of 2.6 belongs to the 5 groups of an AWD-LSTM
(2.6 ** 4, about 46 from end to end); kept for each of 12 blocks it would be 2.5e5, and for 48 blocks 2e20, so that
nearly all of the network would stand still. With 3 groups this default is 3.2 between neighbours, the lower end of
fast.ai's 3x-10x; with the 14 groups of a 12-block encoder 1.19, a layer decay of 0.84.
"""

OWN_GROUPS = {
    "galore": "it makes its own parameter groups from optim_target_modules",
    "apollo": "it makes its own parameter groups from optim_target_modules",
    "lomo": "it updates the model during the backward pass, at one rate",
}
"""What the names of optimizers contain for which groups with rates of their own make no sense, and why."""


def group_learning_rates(num_groups: int, learning_rate: LearningRate, *, factor: float | None = None) -> list[float]:
    """The rate of each layer group, from input to output.

    With `n` groups, group `i` counted from 0 and `lr` the rate of the last group:

    - a number: `lr / factor ** (n - 1 - i)`, where each group's rate is the next one's divided by `factor`; without a
      factor it is `DEFAULT_SPREAD ** (1 / (n - 1))`, which makes the total spread the same for any number of groups;
    - a pair `(low, high)`: `low * (high / low) ** (i / (n - 1))`, geometric from the first group to the last;
    - one number for each group: these.

    Args:
        num_groups: How many layer groups there are.
        learning_rate: The head's rate, a span, or a list. A list of two is a span unless there are two groups.
        factor: At least 1, and only for a single `learning_rate`; 2.6 is ULMFiT's for its 5 groups, 1 means the same
            rate everywhere.

    Raises:
        InputError: A rate or the factor is out of its range, or the number of rates fits nothing.
    """
    if _is_number(learning_rate):
        return _check_rates(_decayed(num_groups, learning_rate, factor), learning_rate)
    if factor is not None:
        raise InputError(
            "factor goes with a single learning_rate; a span or a list has its spacing already. "
            f"Received: factor={factor}, learning_rate={learning_rate}"
        )
    if not isinstance(learning_rate, Sequence) or isinstance(learning_rate, str):
        raise InputError(
            f"learning_rate must be a number, a pair (low, high) or a list of rates. Received: {learning_rate!r}"
        )
    rates = _check_rates(list(learning_rate), learning_rate)
    if len(rates) == 2 and (num_groups != 2 or isinstance(learning_rate, tuple)):
        return _spaced(num_groups, *rates)
    if len(rates) != num_groups:
        raise InputError(
            f"A list of rates must have one for each of the {num_groups} layer groups, from input to output. "
            f"Received: {len(rates)} rates"
        )
    return rates


def _decayed(num_groups: int, learning_rate: float, factor: float | None) -> list[float]:
    if factor is None:
        factor = DEFAULT_SPREAD ** (1 / max(num_groups - 1, 1))
    elif not (_is_number(factor) and 1 <= factor < math.inf):
        raise InputError(
            "factor must be at least 1: each earlier group's rate is the next one's divided by it "
            f"(a layer decay of 0.85 is factor=1.18). Received: factor={factor}"
        )
    try:
        return [learning_rate / factor**distance for distance in reversed(range(num_groups))]
    except OverflowError:
        raise InputError(
            f"factor is too large for {num_groups} layer groups: no number holds the first one's rate. Received: "
            f"factor={factor}"
        ) from None


def _spaced(num_groups: int, low: float, high: float) -> list[float]:
    if low > high:
        raise InputError(f"A span goes from the low rate to the high one. Received: learning_rate=({low}, {high})")
    last = max(num_groups - 1, 1)
    inner = [low * (high / low) ** (index / last) for index in range(1, num_groups - 1)]
    return [low, *inner, high] if num_groups > 1 else [high]


def _check_rates(rates: list[float], received: object) -> list[float]:
    for rate in rates:
        if not (_is_number(rate) and 0 < rate < math.inf):
            raise InputError(f"Learning rates must be positive and finite. Received: learning_rate={received}")
    return [float(rate) for rate in rates]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def decay_parameter_names(model: nn.Module) -> set[str]:
    """The names of the parameters that take weight decay by `Trainer`'s own rule: no biases and no norms.

    `Trainer.get_decay_parameter_names` is a method that never looks at its trainer, so none is needed to ask it.
    """
    return set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]


def discriminative_param_groups(
    model: nn.Module,
    learning_rate: LearningRate,
    *,
    factor: float | None = None,
    num_groups: int | None = None,
    weight_decay: float = 0.0,
    trainable_only: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups for any `torch.optim` optimizer, from input to output, each layer group at its own rate.

    A layer group gives one parameter group that takes weight decay and one that does not (biases and norms), in this
    order, both with its name; where `weight_decay` is 0 it gives one, since optimizers work through their groups one
    by one. Frozen parameters take part, so that what is thawed in mid-run trains and a checkpoint fits whatever is
    frozen; without a gradient, an optimizer passes over them. Quantised weights that cannot be trained never do.

    Args:
        model: Any model that `layer_groups` takes.
        learning_rate: The head's rate, a span or a list; see `group_learning_rates`.
        factor: See `group_learning_rates`.
        num_groups: Merge the layer groups into this many first; see `layer_groups`.
        weight_decay: For the parameters that `Trainer` would decay.
        trainable_only: Leave out what is frozen now, and the groups that this empties; the rates of the others are
            the same as without it.

    Returns:
        Dictionaries with `params`, `lr`, `weight_decay` and `name`.

    Raises:
        InputError: A setting is out of its range, or nothing is left to train.
    """
    groups = layer_groups(model, num_groups)
    rates = group_learning_rates(len(groups), learning_rate, factor=factor)
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and (parameter.requires_grad or not trainable_only)
    }
    if not parameters:
        raise InputError("The model has no trainable parameters: thaw some layers first")
    decayed = decay_parameter_names(model) if weight_decay else set()
    param_groups = []
    for group, rate in zip(groups, rates, strict=True):
        names = [name for name in group.parameter_names if name in parameters]
        for decays in (True, False):
            params = [parameters[name] for name in names if (name in decayed) == decays]
            if params:
                decay = weight_decay if decays else 0.0
                param_groups.append({"params": params, "lr": rate, "weight_decay": decay, "name": group.name})
    return param_groups


class DiscriminativeOptimizerFactory:
    """Builds the optimizer that `TrainingArguments` name over discriminative parameter groups.

    `Trainer` makes one without arguments and calls it with its model and the keywords that come with it; see
    `discriminative_optimizer`.
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        args: TrainingArguments,
        learning_rate: LearningRate | None,
        factor: float | None,
        num_groups: int | None,
        trainable_only: bool,
    ) -> torch.optim.Optimizer:
        """Returns the optimizer for `model`."""
        optimizer_class, settings = _optimizer_class_and_settings(args)
        param_groups = discriminative_param_groups(
            model,
            args.learning_rate if learning_rate is None else learning_rate,
            factor=factor,
            num_groups=num_groups,
            weight_decay=args.weight_decay,
            trainable_only=trainable_only,
        )
        settings["lr"] = param_groups[-1]["lr"]
        optimizer = optimizer_class(_split_by_mesh(param_groups), **settings)
        if settings.get("optim_bits") == 8:
            _keep_embeddings_in_32_bits(model)
        return optimizer


def discriminative_optimizer(
    args: TrainingArguments,
    *,
    factor: float | None = None,
    num_groups: int | None = None,
    learning_rate: LearningRate | None = None,
    trainable_only: bool = False,
) -> tuple[type[DiscriminativeOptimizerFactory], dict[str, Any]]:
    """Discriminative rates in a plain `Trainer`, with whichever optimizer `args.optim` names.

    ```python
    trainer = Trainer(model, args, ..., optimizer_cls_and_kwargs=discriminative_optimizer(args, factor=1.2))
    ```

    Everything else is as `Trainer` would do it: the optimizer's own settings (`adam_beta1`, `optim_args`, ...), which
    parameters take weight decay, the schedule over each group's own rate. With `factor=1` the weights come out the
    same to the bit, but for GrokAdamW, which clips gradients group by group. The log of a plain `Trainer` shows the
    rate of the first group, the lowest.

    Args:
        args: The arguments that the `Trainer` gets too; read when it makes its optimizer.
        factor: See `group_learning_rates`.
        num_groups: See `layer_groups`.
        learning_rate: A span, a list, or the head's rate instead of `args.learning_rate`.
        trainable_only: See `discriminative_param_groups`.

    Returns:
        A factory and its keywords, for `Trainer(optimizer_cls_and_kwargs=...)`.

    Raises:
        InputError: Rates of their own make no sense with `args.optim` (GaLore, APOLLO, LOMO), or its package is not
            installed.
    """
    _optimizer_class_and_settings(args)
    settings = {"learning_rate": learning_rate, "factor": factor, "num_groups": num_groups}
    return DiscriminativeOptimizerFactory, {"args": args, **settings, "trainable_only": trainable_only}


def _optimizer_class_and_settings(args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """What `Trainer` would use for `args.optim`, where it takes parameter groups."""
    name = OptimizerNames(args.optim).value
    for part, reason in OWN_GROUPS.items():
        if part in name:
            raise InputError(f'optim="{name}" cannot have discriminative learning rates: {reason}. Use "adamw_torch"')
    try:
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        raise InputError(f'optim="{name}" cannot be used here: {error}') from error
    if is_optimizer_factory(optimizer_class):
        raise InputError(f'optim="{name}" cannot have discriminative learning rates: it makes its own groups')
    return optimizer_class, settings


def _split_by_mesh(param_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As `Trainer`: tensors on different device meshes (expert parallelism) cannot share one fused kernel call."""
    if not has_mixed_dtensor(param for group in param_groups for param in group["params"]):
        return param_groups
    split = []
    for group in param_groups:
        by_mesh = defaultdict(list)
        for param in group["params"]:
            by_mesh[getattr(param, "device_mesh", None)].append(param)
        split += [{**group, "params": params} for params in by_mesh.values()]
    return split


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """As `Trainer`: the 8-bit optimizers of bitsandbytes keep the state of embeddings in 32 bits, for stability."""
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
