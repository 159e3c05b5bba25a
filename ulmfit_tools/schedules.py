"""Learning-rate schedules of fast.ai and of the papers behind it, for any torch optimizer.

Each schedule is a pure function of the step, the share of its own rate that every group has at that step, in torch's
`LambdaLR`. So groups with different rates keep their ratios, a checkpoint holds nothing but the step and the rates,
and `optimizer.step(); scheduler.step()`, once an update, is all the use there is.

torch's own `CyclicLR` and `OneCycleLR` follow the same curves and are the reference in the tests. They are not used
here since they write other rates into the groups as the `initial_lr` from which a next schedule would start;
`OneCycleLR` also divides by zero where the rise is one step long, and turns up again or negative, then raises, past
the last step; `CyclicLR` overflows after 1024 cycles of triangular2 and empties the state that it loads; and the
lowest rate of `CosineAnnealingWarmRestarts` is one absolute number for all groups.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from numbers import Real
from operator import ge, gt, le, lt
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ulmfit_tools.errors import InputError, nearest


def get_slanted_triangular_schedule(
    optimizer: Optimizer, num_training_steps: int, *, cut_frac: float = 0.1, ratio: float = 32
) -> LambdaLR:
    """Slanted triangular learning rates (STLR): a short linear rise, then a long linear decay.

    With `T = num_training_steps`, at step `t` each group with the highest rate `eta_max` (its `lr`) has

        cut = floor(T * cut_frac)
        p   = t / cut                     if t < cut
              1 - (t - cut) / (T - cut)   otherwise
        eta = eta_max * (1 + p * (ratio - 1)) / ratio

    The paper prints `cut * (1 / cut_frac - 1)` for `T - cut`. The two are the same where `T * cut_frac` is a whole
    number; elsewhere the printed one is too small and takes the rate below `eta_max / ratio` and then below zero
    before the end, while the text ("the fraction of the number of iterations we will decrease the LR") and the
    authors' own code say `T - cut`.

    A run so short that `cut` is 0 has no rise: it starts at its full rate. After step `T` the rate stays at its last
    value.

    Args:
        optimizer: The optimizer, each group with its own highest rate as `lr`.
        num_training_steps: Number of optimizer steps of the whole run.
        cut_frac: The share of the steps in which the rate rises; above 0, at most 1.
        ratio: How many times lower the lowest rate is than the highest; at least 1.

    Raises:
        InputError: A value out of its range.

    Source: Howard & Ruder 2018 (arXiv:1801.06146), section 3.2.
    """
    _check_number("num_training_steps", num_training_steps, low=1, whole=True)
    _check_number("cut_frac", cut_frac, above=0, high=1)
    _check_number("ratio", ratio, low=1)
    cut = math.floor(num_training_steps * cut_frac)
    return LambdaLR(optimizer, partial(_slanted_triangular, last=num_training_steps, cut=cut, ratio=ratio))


def _slanted_triangular(step: int, *, last: int, cut: int, ratio: float) -> float:
    if step < cut:
        p = step / cut
    else:
        p = 1 - (min(step, last) - cut) / max(1, last - cut)  # cut_frac=1: no decay, the last value is the highest
    return (1 + p * (ratio - 1)) / ratio


CyclicalMode = Literal["triangular", "triangular2", "exp_range"]


def get_cyclical_schedule(
    optimizer: Optimizer,
    *,
    step_size: float,
    mode: CyclicalMode = "triangular",
    ratio: float = 4.0,
    gamma: float | None = None,
) -> LambdaLR:
    """Cyclical learning rates: up and down in straight lines, over and over.

    At step `t`, each group between its highest rate `max` (its `lr`) and `base = max / ratio` has

        cycle = floor(t / (2 * step_size))                  # counted from 0
        x     = 1 - |t / step_size - 2 * cycle - 1|         # 0 at both ends of a cycle, 1 in its middle
        lr    = base + (max - base) * x * scale

    with `scale` 1 for "triangular", `0.5 ** cycle` for "triangular2" and `gamma ** t` for "exp_range". Only the
    height of the cycles declines, never `base`, as in torch's `CyclicLR`. The schedule has no end.

    Args:
        optimizer: The optimizer, each group with its own highest rate as `lr`.
        step_size: Number of optimizer steps in half a cycle, at least 1. It need not be whole, so that half an epoch
            of 11 steps is 5.5 and cycles stay in step with epochs.
        mode: "triangular", "triangular2" or "exp_range".
        ratio: How many times lower the lowest rate is than the highest, at least 1. The paper's rule of thumb is 3
            or 4.
        gamma: By what the height is multiplied each step; above 0, at most 1. Needed by "exp_range", and only there.

    Raises:
        InputError: An unknown mode, a value out of its range, `gamma` missing or without use.

    Source: Smith 2015 (arXiv:1506.01186), sections 3.1 and 3.3.
    """
    _check_choice("mode", mode, ("triangular", "triangular2", "exp_range"))
    _check_number("step_size", step_size, low=1)
    _check_number("ratio", ratio, low=1)
    if mode == "exp_range":
        _check_number("gamma", gamma, above=0, high=1)
    elif gamma is not None:
        raise InputError(f'gamma belongs to mode="exp_range" alone; leave it out. Received: mode="{mode}"')
    return LambdaLR(optimizer, partial(_cyclical, step_size=step_size, mode=mode, ratio=ratio, gamma=gamma))


def _cyclical(step: int, *, step_size: float, mode: CyclicalMode, ratio: float, gamma: float | None) -> float:
    cycle, position = divmod(step, 2 * step_size)
    height = 1 - abs(position / step_size - 1)
    if mode == "triangular2":
        height *= 0.5**cycle
    elif gamma is not None:
        height *= gamma**step
    return (1 + height * (ratio - 1)) / ratio


def get_sgdr_schedule(
    optimizer: Optimizer,
    *,
    cycle_len: float,
    cycle_mult: float = 1,
    min_ratio: float = 0.0,
    warmup_len: float = 0,
    steps_per_epoch: int = 1,
) -> LambdaLR:
    """SGDR: the rate falls along half a cosine, jumps back to its start (a warm restart), and falls again.

    `T_cur` steps after the last restart, in a cycle of `T_i` steps, each group with the rate `max` (its `lr`) has

        lr = max * (min_ratio + (1 - min_ratio) * (1 + cos(pi * T_cur / T_i)) / 2)

    The first cycle is `cycle_len` long and each next one `cycle_mult` times longer than the one before; with
    `cycle_len=1, cycle_mult=2` restarts come after 1, 3, 7, 15 ... The schedule has no end, so a run is best made as
    long as a number of whole cycles.

    The paper begins at the highest rate, where Adam's first steps, of which each goes as far as the rate allows, shake
    pretrained weights. With `warmup_len` the first `w` steps have `(step + 1) / w` of their rate; restarts have none.

    Args:
        optimizer: The optimizer, each group with its own highest rate as `lr`.
        cycle_len: Length of the first cycle, in epochs of `steps_per_epoch` optimizer steps; by default, then, in
            steps. Any number above 0; a cycle of less than one step becomes one step.
        cycle_mult: How many times longer each cycle is than the one before; any number from 1.
        min_ratio: The lowest rate as a share of the highest (the paper's eta_min / eta_max); from 0 to 1.
        warmup_len: Length of the rise at the beginning, in the unit of `cycle_len`; 0 for none.
        steps_per_epoch: Number of optimizer steps in the unit of `cycle_len`.

    Raises:
        InputError: A value out of its range.

    Source: Loshchilov & Hutter 2016 (arXiv:1608.03983), section 3; `cycle_len` and `cycle_mult` are fast.ai's names
    for T_0 and T_mult. fast.ai's library warmed up, too: a hundredth of the rate for a twentieth of the first cycle.
    """
    _check_number("cycle_len", cycle_len, above=0)
    _check_number("cycle_mult", cycle_mult, low=1)
    _check_number("min_ratio", min_ratio, low=0, high=1)
    _check_number("warmup_len", warmup_len, low=0)
    _check_number("steps_per_epoch", steps_per_epoch, low=1, whole=True)
    first = max(1, cycle_len * steps_per_epoch)
    shape = partial(
        _sgdr, first=first, cycle_mult=cycle_mult, min_ratio=min_ratio, warmup=max(1, warmup_len * steps_per_epoch)
    )
    return LambdaLR(optimizer, shape)


def _sgdr(step: int, *, first: float, cycle_mult: float, min_ratio: float, warmup: float) -> float:
    length = first
    position: float = step
    if cycle_mult == 1:
        position = step % length
    while position >= length:
        position -= length
        length *= cycle_mult
    share = min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * position / length)) / 2
    return share * min((step + 1) / warmup, 1)


AnnealStrategy = Literal["cos", "linear"]


def get_one_cycle_schedule(
    optimizer: Optimizer,
    num_training_steps: int,
    *,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
    anneal_strategy: AnnealStrategy = "cos",
    cycle_momentum: bool = True,
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
) -> LambdaLR:
    """One-cycle: the rate rises once and falls far below its start; momentum goes the other way.

    Each group with the rate `max` (its `lr`), over `T = num_training_steps` steps, goes through

        step                   rate                                     momentum
        0                      max / div_factor                         max_momentum
        pct_start * T - 1      max                                      base_momentum
        T - 1                  max / div_factor / final_div_factor      max_momentum

    and between these along half a cosine or a straight line. With `three_phase` the rate first returns to
    `max / div_factor`, as slowly as it rose (step `2 * pct_start * T - 2`), and then falls to its lowest value at
    full momentum: with `anneal_strategy="linear"` this is the cycle of the paper. From step `T - 1` on the values
    stay. Arguments and curve are those of torch's `OneCycleLR`, but a rise of less than one step starts at the full
    rate.

    Momentum is a group's `momentum` (SGD, RMSprop, Muon) or else the first of its `betas` (the Adam family, Lion). A
    group that has none, or whose momentum is 0 (plain SGD, RMSprop as torch creates it), keeps what it has: switching
    momentum on would multiply the size of its steps.

    Args:
        optimizer: The optimizer, each group with its own highest rate as `lr`.
        num_training_steps: Number of optimizer steps of the whole run.
        pct_start: The share of the steps in which the rate rises; from 0 to 1, with `three_phase` to 0.5.
        div_factor: How many times lower the first rate is than the highest; at least 1.
        final_div_factor: How many times lower the last rate is than the first; at least 1.
        three_phase: Whether the fall below the first rate is a phase of its own.
        anneal_strategy: "cos" or "linear".
        cycle_momentum: Whether momentum is changed at all.
        base_momentum: Momentum at the highest rate; above 0.
        max_momentum: Momentum at the lowest rates; at least `base_momentum`, below 1.

    Raises:
        InputError: A value out of its range.

    Source: Smith 2018 (arXiv:1803.09820); fast.ai's `fit_one_cycle`; torch's `OneCycleLR`.
    """
    _check_number("num_training_steps", num_training_steps, low=1, whole=True)
    _check_number("pct_start", pct_start, low=0, high=0.5 if three_phase else 1)
    _check_number("div_factor", div_factor, low=1)
    _check_number("final_div_factor", final_div_factor, low=1)
    _check_choice("three_phase", three_phase, (False, True))
    _check_choice("anneal_strategy", anneal_strategy, ("cos", "linear"))
    _check_choice("cycle_momentum", cycle_momentum, (False, True))
    _check_number("max_momentum", max_momentum, above=0, below=1)
    _check_number("base_momentum", base_momentum, above=0, high=max_momentum)
    rise = pct_start * num_training_steps
    first = 1 / div_factor
    steps = [0, max(0, rise - 1), num_training_steps - 1]
    rates = [first, 1, first / final_div_factor]
    momenta = [max_momentum, base_momentum, max_momentum]
    if three_phase:
        steps.insert(2, max(0, 2 * rise - 2))
        rates.insert(2, first)
        momenta.insert(2, max_momentum)
    curve = partial(_through, steps=steps, strategy=anneal_strategy)
    if not cycle_momentum:
        return LambdaLR(optimizer, partial(curve, values=rates))
    return _RateAndMomentum(optimizer, partial(curve, values=rates), partial(curve, values=momenta))


def _through(step: int, *, steps: Sequence[float], values: Sequence[float], strategy: AnnealStrategy) -> float:
    """The value at `step` on the curve through `values` at `steps`; before and after them, the outermost value."""
    for (left, right), (start, end) in zip(pairwise(steps), pairwise(values), strict=True):
        if step <= right:
            done = (step - left) / (right - left) if right > left else 1.0
            if strategy == "cos":
                done = (1 - math.cos(math.pi * done)) / 2
            return start + (end - start) * done
    return values[-1]


class _RateAndMomentum(LambdaLR):
    """`LambdaLR` that sets every group's momentum too, from a second function of the step."""

    def __init__(
        self, optimizer: Optimizer, lr_lambda: Callable[[int], float], momentum_lambda: Callable[[int], float]
    ):
        self.momentum_lambda = momentum_lambda
        super().__init__(optimizer, lr_lambda)

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        momentum = self.momentum_lambda(self.last_epoch)
        for group in self.optimizer.param_groups:
            if group.get("momentum"):
                group["momentum"] = momentum
            elif "betas" in group and group["betas"][0]:
                group["betas"] = (momentum, *group["betas"][1:])

    def state_dict(self) -> dict[str, Any]:
        # A function in a checkpoint could not be loaded with weights_only=True; like the rate's, it is rebuilt.
        return {key: value for key, value in super().state_dict().items() if key != "momentum_lambda"}


def _cyclical_by_name(
    optimizer: Optimizer,
    *,
    steps_per_epoch: int,
    step_size: float | None = None,
    step_epochs: float | None = None,
    ratio: float = 4.0,
    mode: CyclicalMode,
) -> LambdaLR:
    step_size = _half_cycle(steps_per_epoch, step_size, step_epochs)
    return get_cyclical_schedule(optimizer, step_size=step_size, mode=mode, ratio=ratio)


def _exp_range_by_name(
    optimizer: Optimizer,
    *,
    num_training_steps: int,
    steps_per_epoch: int,
    step_size: float | None = None,
    step_epochs: float | None = None,
    ratio: float = 4.0,
    gamma: float | None = None,
) -> LambdaLR:
    step_size = _half_cycle(steps_per_epoch, step_size, step_epochs)
    # The paper's 0.99994 suits its 70,000 steps; in a fine-tuning run of some hundred it would change nothing.
    gamma = 0.1 ** (1 / num_training_steps) if gamma is None else gamma
    return get_cyclical_schedule(optimizer, step_size=step_size, mode="exp_range", ratio=ratio, gamma=gamma)


def _half_cycle(steps_per_epoch: int, step_size: float | None, step_epochs: float | None) -> float:
    if step_size is None:
        step_epochs = 0.5 if step_epochs is None else step_epochs
        _check_number("step_epochs", step_epochs, above=0)
        return max(1, step_epochs * steps_per_epoch)
    if step_epochs is not None:
        raise InputError(f"Give step_size (in steps) or step_epochs, not both. Received: {step_size=}, {step_epochs=}")
    return step_size


def _sgdr_by_name(
    optimizer: Optimizer,
    *,
    steps_per_epoch: int,
    cycle_len: float | None = None,
    cycle_steps: int | None = None,
    cycle_mult: float = 1,
    min_ratio: float = 0.0,
    warmup_len: float = 0,
) -> LambdaLR:
    if cycle_steps is not None:
        if cycle_len is not None:
            raise InputError(
                f"Give cycle_len (in epochs) or cycle_steps, not both. Received: {cycle_len=}, {cycle_steps=}"
            )
        _check_number("cycle_steps", cycle_steps, low=1, whole=True)
        cycle_len, steps_per_epoch = cycle_steps, 1
    return get_sgdr_schedule(
        optimizer,
        cycle_len=1 if cycle_len is None else cycle_len,
        cycle_mult=cycle_mult,
        min_ratio=min_ratio,
        warmup_len=warmup_len,
        steps_per_epoch=steps_per_epoch,
    )


SCHEDULES: dict[str, Callable[..., LRScheduler]] = {
    "slanted_triangular": get_slanted_triangular_schedule,
    "triangular": partial(_cyclical_by_name, mode="triangular"),
    "triangular2": partial(_cyclical_by_name, mode="triangular2"),
    "exp_range": _exp_range_by_name,
    "sgdr": _sgdr_by_name,
    "one_cycle": get_one_cycle_schedule,
}
"""The schedules by name. Build one with `get_schedule`, which knows what each of them takes."""

_NOT_SETTINGS = ("optimizer", "num_training_steps", "steps_per_epoch", "mode")


def schedule_settings(name: str) -> list[str]:
    """The names of the settings that a schedule takes, in `get_schedule` and in a plan.

    Raises:
        InputError: There is no schedule of this name.
    """
    if name not in list(SCHEDULES):
        raise InputError(f'There is no schedule "{name}"; there are {", ".join(SCHEDULES)}.{nearest(name, SCHEDULES)}')
    return [key for key in inspect.signature(SCHEDULES[name]).parameters if key not in _NOT_SETTINGS]


def get_schedule(
    name: str, optimizer: Optimizer, *, num_training_steps: int, steps_per_epoch: int, **settings: Any
) -> LRScheduler:
    """A schedule by its name, its lengths fitted to the run.

    | name                    | settings                                                                        |
    |-------------------------|---------------------------------------------------------------------------------|
    | slanted_triangular      | `cut_frac`, `ratio`                                                             |
    | triangular, triangular2 | `step_size` in steps or `step_epochs` in epochs (default 0.5); `ratio`          |
    | exp_range               | the same; `gamma` (default: a tenth of the height is left at the end)           |
    | sgdr                    | `cycle_len` in epochs (default 1) or `cycle_steps`; `cycle_mult`, `min_ratio`,  |
    |                         | `warmup_len` in the same unit (default 0)                                       |
    | one_cycle               | those of `get_one_cycle_schedule`                                               |

    Args:
        name: A key of `SCHEDULES`.
        optimizer: The optimizer, each group with its own highest rate as `lr`.
        num_training_steps: Number of optimizer steps of the whole run.
        steps_per_epoch: Number of optimizer steps in an epoch.
        **settings: What the schedule of this name takes; everything has a default.

    Raises:
        InputError: An unknown name or setting, or a value out of its range.
    """
    run = {"num_training_steps": num_training_steps, "steps_per_epoch": steps_per_epoch}
    return _build(name, optimizer, run, settings)


def check_schedule(name: str, settings: Mapping[str, Any] | None = None) -> None:
    """Refuse a wrong schedule before anything is loaded or trained.

    Args:
        name: A key of `SCHEDULES`.
        settings: The settings as `get_schedule` would get them.

    Raises:
        InputError: What `get_schedule` would raise for this name and these settings.
    """
    _build(name, _stand_in([1.0]), {"num_training_steps": 100, "steps_per_epoch": 10}, settings or {})


def _build(name: str, optimizer: Optimizer, run: Mapping[str, int], settings: Mapping[str, Any]) -> LRScheduler:
    allowed = schedule_settings(name)
    for key, value in settings.items():
        if key not in allowed:
            raise InputError(
                f'The schedule "{name}" has no setting "{key}"; it has {", ".join(allowed)}.{nearest(key, allowed)}'
                f" Received: {key}={value!r}"
            )
    for key, steps in run.items():
        _check_number(key, steps, low=1, whole=True)
    taken = inspect.signature(SCHEDULES[name]).parameters
    return SCHEDULES[name](optimizer, **{key: steps for key, steps in run.items() if key in taken}, **settings)


def simulate(
    build: Callable[[Optimizer], LRScheduler],
    learning_rates: Sequence[float],
    num_training_steps: int,
    *,
    quantity: Literal["lr", "momentum"] = "lr",
) -> list[list[float]]:
    """What a schedule does, without a model: the rate of each group at each step.

    Args:
        build: Makes the schedule for an optimizer, e.g. `partial(get_sgdr_schedule, cycle_len=100)`.
        learning_rates: The highest rate of each group, from input to output.
        num_training_steps: Number of optimizer steps.
        quantity: "lr" or "momentum" (the optimizer that stands in is SGD with momentum 0.9).

    Returns:
        For each group, the values of its `num_training_steps` steps: `[group][step]`.
    """
    optimizer = _stand_in(learning_rates)
    schedule = build(optimizer)
    by_step = []
    for _ in range(num_training_steps):
        by_step.append([float(group[quantity]) for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return [list(values) for values in zip(*by_step, strict=True)]


def _stand_in(learning_rates: Sequence[float]) -> Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in learning_rates]
    return torch.optim.SGD(groups, lr=1.0, momentum=0.9)


def _check_number(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> None:
    """Refuse what is not a number within the bounds; settings come from YAML files and command lines."""
    every = [(low, "of at least", ge), (above, "above", gt), (high, "at most", le), (below, "below", lt)]
    bounds = [(bound, words, holds) for bound, words, holds in every if bound is not None]
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        number = float(value)
        if all(holds(number, bound) for bound, _, holds in bounds) and (number.is_integer() or not whole):
            return
    limits = " and ".join(f"{words} {bound}" for bound, words, _ in bounds)
    raise InputError(f"{name} must be a {'whole ' if whole else ''}number {limits}. Received: {name}={value!r}")


def _check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        names = [str(choice) for choice in allowed]
        raise InputError(
            f"{name} must be one of {', '.join(names)}.{nearest(value, names)} Received: {name}={value!r}"
        )
