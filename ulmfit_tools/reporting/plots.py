"""Plots of schedules. Each function draws into matplotlib axes and returns them; it neither shows nor saves."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ulmfit_tools.errors import InputError
from ulmfit_tools.schedules import get_schedule, simulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_schedule(
    schedule: str | Callable[[Optimizer], LRScheduler],
    *,
    num_training_steps: int,
    learning_rates: Sequence[float] = (1.0,),
    steps_per_epoch: int | None = None,
    settings: Mapping[str, Any] | None = None,
    group_names: Sequence[str] | None = None,
    quantity: Literal["lr", "momentum"] = "lr",
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the rate (or momentum) of every group over a run, without a model.

    Args:
        schedule: A name from `SCHEDULES`, or what makes a schedule for an optimizer, e.g.
            `partial(get_one_cycle_schedule, num_training_steps=1000)`.
        num_training_steps: Number of optimizer steps to draw.
        learning_rates: The highest rate of each group, from input to output. The default draws the share that every
            group has of its own rate.
        steps_per_epoch: Number of optimizer steps in an epoch; with it, the horizontal axis is in epochs. A named
            schedule counts the whole run as one epoch without it.
        settings: What the named schedule takes, as in `get_schedule`.
        group_names: A label for each group. Each stands right of its line's highest value.
        quantity: "lr" or "momentum".
        ax: Axes to draw into; by default those of a new figure. Where rates are far apart, give axes whose vertical
            scale is already "log".

    Returns:
        The axes.

    Raises:
        InputError: matplotlib is not installed, names and rates do not match in number, or the schedule is refused.
    """
    if group_names is not None and len(group_names) != len(learning_rates):
        raise InputError(f"Give a group name for each of {len(learning_rates)} rates. Received: {group_names=}")
    build = schedule
    if isinstance(build, str):
        build = partial(
            get_schedule,
            build,
            num_training_steps=num_training_steps,
            steps_per_epoch=steps_per_epoch or num_training_steps,
            **(settings or {}),
        )
    curves = simulate(build, learning_rates, num_training_steps, quantity=quantity)
    if ax is None:
        ax = _new_axes()
    unit = steps_per_epoch or 1
    times = [step / unit for step in range(num_training_steps)]
    colours = _ramp(len(curves))
    for curve, colour in zip(curves, colours, strict=True):
        ax.plot(times, curve, color=colour, linewidth=1.6)
    ax.set_xlabel("Epochs" if steps_per_epoch else "Optimizer steps")
    ax.set_ylabel("Momentum" if quantity == "momentum" else _rate_label(learning_rates))
    ax.margins(x=0.01)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    if ax.get_yscale() == "linear":
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    if group_names is not None:
        _label_right(ax, [max(curve) for curve in curves], group_names, colours)
    return ax


def _rate_label(learning_rates: Sequence[float]) -> str:
    return "Share of each group's rate" if list(learning_rates) == [1.0] else "Learning rate"


def _new_axes() -> "Axes":
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError('Plots need matplotlib, which is not installed: pip install "ulmfit-tools[plot]"') from None
    return plt.subplots(figsize=(7, 4), layout="constrained")[1]


def _ramp(number: int) -> list[Any]:
    """Colours from light (input) to dark (output); a single curve is dark."""
    import matplotlib

    positions = [1 - index / max(1, number - 1) for index in range(number)] if number > 1 else [0.0]
    return [matplotlib.colormaps["viridis"](0.15 + 0.65 * position) for position in positions]


def _label_right(ax: "Axes", heights: Sequence[float], labels: Sequence[str], colours: Sequence[Any]) -> None:
    """Write labels right of the axes at these heights, each joined to its height by a line of its curve's colour."""
    ax.autoscale_view()  # lazy otherwise, and the transforms would be those of empty axes
    to_share = ax.transData + ax.transAxes.inverted()
    wanted = {index: float(to_share.transform((0, heights[index]))[1]) for index in _thinned(len(labels))}
    order = sorted(wanted, key=wanted.__getitem__)
    places = _spread([wanted[index] for index in order], gap=0.05)
    for index, place in zip(order, places, strict=True):
        line = {"arrowstyle": "-", "color": colours[index], "linewidth": 0.7, "relpos": (0, 0.5), "shrinkB": 0}
        ax.annotate(
            labels[index],
            xy=(1, wanted[index]),
            xycoords="axes fraction",
            xytext=(1.04, place),
            textcoords="axes fraction",
            va="center",
            color=colours[index],
            fontsize="small",
            arrowprops=line,
            annotation_clip=False,
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights moved as little as possible (least squares) until each is `gap` above the one before.

    With `gap * index` taken off, that is the nearest sequence that does not fall: an isotonic regression.
    """
    from sklearn.isotonic import isotonic_regression

    steps = [gap * index for index in range(len(heights))]
    rising = isotonic_regression(
        [height - step for height, step in zip(heights, steps, strict=True)], y_min=0, y_max=1 - steps[-1]
    )
    return [float(height) + step for height, step in zip(rising, steps, strict=True)]


def _thinned(number: int, most: int = 16) -> list[int]:
    """At most `most` of the indices 0 ... `number - 1`, evenly spaced, always the first and the last."""
    if number <= most:
        return list(range(number))
    return sorted({round(position * (number - 1) / (most - 1)) for position in range(most)})
