"""Plots: what is drawn, read back from the axes."""

import runpy
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import matplotlib
import pytest
from matplotlib.text import Text

from ulmfit_tools.errors import InputError
from ulmfit_tools.reporting.plots import plot_schedule
from ulmfit_tools.schedules import get_one_cycle_schedule, get_schedule, simulate

matplotlib.use("Agg")
RATES = [1e-5, 5e-5, 2e-4]
NAMES = ["embeddings", "encoder", "classifier"]
RECIPE = Path(__file__).parents[1] / "recipes" / "paper_schedules.py"


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    matplotlib.pyplot.close("all")


def drawn(ax):
    return [line.get_ydata().tolist() for line in ax.lines]


def test_every_group_is_drawn_as_it_is_simulated():
    ax = plot_schedule(
        "sgdr", num_training_steps=70, learning_rates=RATES, steps_per_epoch=10, settings={"cycle_mult": 2}
    )
    build = partial(get_schedule, "sgdr", num_training_steps=70, steps_per_epoch=10, cycle_mult=2)
    assert drawn(ax) == simulate(build, RATES, 70)
    assert ax.lines[0].get_xdata()[35] == 3.5
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Epochs", "Learning rate")
    assert len({line.get_color() for line in ax.lines}) == 3


def test_a_builder_into_given_axes_in_steps():
    _, axes = matplotlib.pyplot.subplots(2)
    build = partial(get_one_cycle_schedule, num_training_steps=30)
    assert plot_schedule(build, num_training_steps=30, ax=axes[0]) is axes[0]
    plot_schedule(build, num_training_steps=30, ax=axes[1], quantity="momentum")
    assert drawn(axes[0]) == simulate(build, [1.0], 30)
    assert drawn(axes[1]) == simulate(build, [1.0], 30, quantity="momentum")
    assert [ax.get_xlabel() for ax in axes] == ["Optimizer steps"] * 2
    assert [ax.get_ylabel() for ax in axes] == ["Share of each group's rate", "Momentum"]


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_labels_stand_at_the_height_of_their_curves(scale):
    _, ax = matplotlib.pyplot.subplots()
    ax.set_yscale(scale)
    rates = [1e-4, 1e-3, 2e-3]
    plot_schedule("one_cycle", num_training_steps=100, learning_rates=rates, group_names=NAMES, ax=ax)
    assert [text.get_text() for text in ax.texts] == NAMES
    for text, rate in zip(ax.texts, rates, strict=True):
        share = (ax.transData + ax.transAxes.inverted()).transform((0, rate))[1]
        assert text.xy == (1, pytest.approx(share))
        assert text.xyann[1] == pytest.approx(share, abs=0.03)


def test_labels_of_many_groups_do_not_overlap():
    rates = [1e-3 / 2.6 ** (13 - group) for group in range(14)]  # most of them lie together at the bottom
    names = [f"layer {group}" for group in range(14)]
    ax = plot_schedule("triangular", num_training_steps=20, learning_rates=rates, group_names=names)
    ax.figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # an annotation's own extent has its line in it
    assert len(boxes) == 14
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))
    assert all(box.x1 <= ax.figure.bbox.x1 for box in boxes)


def test_labels_of_very_many_groups_are_thinned_to_what_fits():
    names = [f"layer {group}" for group in range(49)]
    ax = plot_schedule("triangular", num_training_steps=20, learning_rates=[1e-3] * 49, group_names=names)
    shown = [text.get_text() for text in ax.texts]
    assert len(ax.lines) == 49
    assert len(shown) == 16
    assert {"layer 0", "layer 48"} <= set(shown)


def test_names_must_match_the_rates():
    with pytest.raises(InputError, match=r"a group name for each of 3 rates\. Received: group_names=\['a'\]"):
        plot_schedule("sgdr", num_training_steps=10, learning_rates=RATES, group_names=["a"])


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(InputError, match=r'pip install "ulmfit-tools\[plot\]"'):
        plot_schedule("sgdr", num_training_steps=10)


def test_the_module_itself_loads_no_matplotlib():
    code = "import sys, ulmfit_tools.reporting.plots; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=RECIPE.parents[1])


# The figures of the source papers, drawn by the recipe.


def test_paper_figures(tmp_path, monkeypatch, capsys):
    image = tmp_path / "figures.png"
    monkeypatch.setattr(sys, "argv", [RECIPE.name, "--output", str(image)])
    runpy.run_path(str(RECIPE), run_name="__main__")
    assert image.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"Drawn: {image}\n"
    stlr, triangular, triangular2, exp_range, mult_1, mult_2, rate, momentum = matplotlib.pyplot.gcf().axes

    # Howard & Ruder 2018, figure 2: a tenth of the steps up to 0.01, from and to a 32nd of it.
    (curve,) = drawn(stlr)
    assert curve.index(max(curve)) == 160
    assert (curve[0], curve[160]) == (pytest.approx(0.01 / 32), pytest.approx(0.01))
    assert curve[-1] == pytest.approx(0.01 / 32, rel=0.03)  # a step before the end

    # Smith 2015: bounds at multiples of the step size; the height halves, or falls by gamma each step.
    peaks = range(2000, 20000, 4000)
    for ax, heights in [
        (triangular, [1, 1, 1, 1, 1]),
        (triangular2, [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]),
        (exp_range, [0.99994**step for step in peaks]),
    ]:
        (curve,) = drawn(ax)
        assert [curve[step] for step in range(0, 20000, 4000)] == pytest.approx([0.001] * 5)
        assert [curve[step] for step in peaks] == pytest.approx([0.001 + 0.005 * height for height in heights])

    # Loshchilov & Hutter 2016, figure 1: where the rate jumps back to 0.05, in epochs.
    def restarts(curve):
        return [step // 10 for step, value in enumerate(curve) if value == 0.05]

    assert [restarts(curve) for curve in drawn(mult_1)] == [[0, 50, 100, 150], [0, 100], [0]]
    assert [restarts(curve) for curve in drawn(mult_2)] == [[0, 1, 3, 7, 15, 31, 63, 127], [0, 10, 30, 70, 150]]
    assert drawn(mult_1)[2][1000] == pytest.approx(0.025)  # half way down after half the epochs

    # Smith 2018: momentum is lowest where the rate is highest, and full while the rate falls below its start.
    (curve,), (momenta,) = drawn(rate), drawn(momentum)
    assert (curve[0], max(curve), curve[-1]) == tuple(pytest.approx(value) for value in (0.08, 0.8, 0.0008))
    assert curve.index(max(curve)) == momenta.index(min(momenta)) == 409
    assert (momenta[0], momenta[409], momenta[-1]) == tuple(pytest.approx(value) for value in (0.95, 0.85, 0.95))
    assert momenta[820:] == pytest.approx([0.95] * 130)
