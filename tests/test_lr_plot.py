"""The picture and the table of a range test show what is in the curve."""

import io
import subprocess
import sys

import matplotlib
import pytest
from curves import falling_curve
from rich.console import Console

from ulmfit_tools.lr_curve import Probe
from ulmfit_tools.reporting.lr_plot import MEANINGS, plot_lr_curve, print_lr_curve, save_lr_curve

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_every_suggestion_is_marked_at_its_rate():
    curve = falling_curve()
    ax = curve.plot()
    marked = {line.get_label().split(":")[0]: line.get_xdata()[0] for line in ax.lines[2:]}
    assert marked == {name.replace("_", " "): rate for name, rate in curve.suggestions.items()}
    assert set(curve.suggestions) == set(MEANINGS)


def test_raw_and_smoothed_losses_on_a_logarithmic_axis():
    curve = falling_curve()
    ax = plot_lr_curve(curve)
    raw, smooth = ax.lines[:2]
    assert tuple(raw.get_ydata()) == curve.losses
    assert tuple(smooth.get_ydata()) == curve.smoothed
    assert ax.get_xscale() == "log"
    bottom, top = ax.get_ylim()
    assert bottom < min(curve.smoothed)
    assert top < max(curve.losses), "the divergence would flatten all else"


def test_cyclical_range_is_shaded():
    curve = falling_curve()
    (patch,) = plot_lr_curve(curve).patches
    assert (patch.get_x(), patch.get_x() + patch.get_width()) == pytest.approx(curve.cyclical_range)


def test_draws_into_given_axes_and_saves(tmp_path):
    figure, ax = plt.subplots()
    assert falling_curve().plot(ax) is ax
    figure.savefig(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_saving_asks_no_backend_and_leaves_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "figure", None)
    monkeypatch.setattr(plt, "subplots", None)
    save_lr_curve(falling_curve(), str(tmp_path / "curve.png"))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == []


def test_linear_sweep_has_a_linear_axis():
    assert falling_curve(mode="linear").plot().get_xscale() == "linear"


def test_table_names_rates_meanings_and_verdict():
    curve = falling_curve(probes=(Probe(rate=1e-4, peak=3e-4, loss=0.5), Probe(rate=2e-4, peak=6e-4, loss=None)))
    text = io.StringIO()
    print_lr_curve(curve, Console(file=text, width=150))
    printed = text.getvalue()
    for name, rate in curve.suggestions.items():
        assert f"{rate:.2e}" in printed
        assert MEANINGS[name] in printed
    assert curve.verdict in printed
    assert "loss 0.5000" in printed
    assert "not a number" in printed


def test_no_plotting_library_is_loaded_until_something_is_drawn():
    code = "import sys, ulmfit_tools.lr_curve, ulmfit_tools.reporting.lr_plot; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
