"""A range test as a picture and as a table in the terminal."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ulmfit_tools.errors import InputError
from ulmfit_tools.lr_curve import LRCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEANINGS = {
    "default": "what to take",
    "still_falling": "the highest rate at which the loss still clearly falls (Smith 2015)",
    "steepest": "where the loss falls fastest (Lightning, torch-lr-finder)",
    "valley": "the middle of the longest fall (fastai)",
    "minimum_tenth": "a tenth of the rate of the lowest loss (fastai)",
}
_SIZE = (8.5, 4)  # inches
_NO_MATPLOTLIB = 'Plots need matplotlib, which is not installed: pip install "ulmfit-tools[plot]"'
_COLOURS = {"default": "C3", "still_falling": "C4", "steepest": "C1", "valley": "C2", "minimum_tenth": "C5"}


def plot_lr_curve(curve: LRCurve, ax: "Axes | None" = None) -> "Axes":
    """Draw the loss against the rate: raw, smoothed, every suggestion, and the range for cyclical schedules shaded.

    The vertical axis shows the losses that were reached before they diverged; what lies above is cut off.

    Args:
        curve: The result of a range test.
        ax: Axes to draw into; by default those of a new figure.

    Returns:
        The axes; `ax.figure.savefig("curve.png")` writes the picture.

    Raises:
        InputError: matplotlib is not installed.
    """
    ax = ax or _new_axes()
    ax.plot(curve.rates, curve.losses, ".", color="0.65", markersize=4, label="loss of each step")
    ax.plot(curve.rates, curve.smoothed, color="C0", linewidth=2, label="smoothed")
    for number, sweep in enumerate(curve.repeats):
        label = None if number else f"the other sweep{'s' * (len(curve.repeats) > 1)}, smoothed"
        ax.plot(sweep.rates, sweep.smoothed, color="C0", linewidth=1, alpha=0.45, label=label)
    low, high = curve.cyclical_range
    ax.axvspan(low, high, color="C3", alpha=0.12, linewidth=0, label=f"for cycles: {low:.1e} to {high:.1e}")
    for name, rate in curve.suggestions.items():
        style = {"linewidth": 2.0} if name == "default" else {"linewidth": 1.2, "linestyle": "--"}
        label = f"{name.replace('_', ' ')}: {rate:.1e}"
        ax.axvline(rate, color=_COLOURS[name], label=label, **style)
    ax.set_xscale("log" if curve.mode == "exponential" else "linear")
    bottom = min(min(curve.losses), *(sweep.smoothed[sweep.lowest] for sweep in curve.sweeps))
    top = max(curve.level, *curve.losses[: curve.turn + 1])
    ax.set_ylim(bottom - 0.1 * (top - bottom), top + 0.5 * (top - bottom))
    ax.set_xlabel("Learning rate of the head")
    ax.set_ylabel("Loss on the evaluation batches" if curve.loss_on == "evaluation" else "Training loss")
    ax.set_title(f"Learning rate range test: {curve.suggestion:.1e}, confidence {curve.confidence}")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small")
    return ax


def _new_axes() -> "Axes":
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError(_NO_MATPLOTLIB) from None
    return plt.subplots(figsize=_SIZE, layout="constrained")[1]


def save_lr_curve(curve: LRCurve, path: str) -> None:
    """Draw the curve into a PNG file, for people without a notebook.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(_NO_MATPLOTLIB) from None
    figure = Figure(figsize=_SIZE, layout="constrained")  # without pyplot, which may look for a display
    plot_lr_curve(curve, ax=figure.subplots())
    figure.savefig(path, dpi=120, bbox_inches="tight")


def print_lr_curve(curve: LRCurve, console: Console | None = None) -> None:
    """Print the suggestions, what the probes came to, and how sure the result is."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 150)  # a pipe has no width of its own
    table = Table(title=f"Learning rate range test, {curve.steps} steps")
    table.add_column("suggestion")
    table.add_column("rate of the head", justify="right", no_wrap=True)
    table.add_column("")
    for name, rate in curve.suggestions.items():
        style = "bold" if name == "default" else None
        table.add_row(name.replace("_", " "), f"{rate:.2e}", MEANINGS[name], style=style)
    low, high = curve.cyclical_range
    table.add_row("cyclical range", f"{low:.2e} to {high:.2e}", "for triangular schedules (Smith 2015)")
    console.print(table)
    for probe in curve.probes:
        ended = "not a number" if probe.loss is None else f"loss {probe.loss:.4f}"
        console.print(f"  probe of {probe.rate:.2e}: {ended}", markup=False)
    console.print(f"Confidence {curve.confidence}. {curve.verdict}", markup=False, soft_wrap=True)
