"""The schedules as their papers draw them, on one page: python recipes/paper_schedules.py --output schedules.png."""

import argparse
from functools import partial

import matplotlib.pyplot as plt

from ulmfit_tools.reporting.plots import plot_schedule
from ulmfit_tools.schedules import get_cyclical_schedule, get_one_cycle_schedule, get_sgdr_schedule

# Howard & Ruder 2018, figure 2: the triangle that slants, with their rate for classifiers.
STLR = {"num_training_steps": 1600, "learning_rates": [0.01], "settings": {"cut_frac": 0.1, "ratio": 32}}

# Smith 2015, figure 2 and section 3.1, with the bounds and step size of its CIFAR-10 runs.
BASE_LR, MAX_LR, STEP_SIZE, GAMMA = 0.001, 0.006, 2000, 0.99994
CYCLES = 5

# Loshchilov & Hutter 2016, figure 1: 200 epochs from 0.05 down to 0, for five pairs of T_0 (epochs) and T_mult.
ETA_MAX, EPOCHS, STEPS_PER_EPOCH = 0.05, 200, 10
RESTARTS = {"T_mult = 1": [(50, 1), (100, 1), (200, 1)], "T_mult = 2": [(1, 2), (10, 2)]}

# Smith 2018: one cycle with momentum, then the last epochs far below it; the paper's three straight lines.
ONE_CYCLE_EPOCHS, RISE_EPOCHS = 95, 41
ONE_CYCLE = partial(
    get_one_cycle_schedule,
    num_training_steps=ONE_CYCLE_EPOCHS * STEPS_PER_EPOCH,
    pct_start=RISE_EPOCHS / ONE_CYCLE_EPOCHS,
    div_factor=10,
    final_div_factor=100,
    three_phase=True,
    anneal_strategy="linear",
)


def draw(axes):
    """Fill eight axes."""
    stlr, *cyclical, first, second, rate, momentum = axes
    plot_schedule("slanted_triangular", **STLR, ax=stlr)
    stlr.set_title("Slanted triangular\nHoward & Ruder 2018, figure 2")

    for ax, mode in zip(cyclical, ["triangular", "triangular2", "exp_range"], strict=True):
        gamma = GAMMA if mode == "exp_range" else None
        build = partial(get_cyclical_schedule, step_size=STEP_SIZE, mode=mode, ratio=MAX_LR / BASE_LR, gamma=gamma)
        plot_schedule(build, num_training_steps=2 * CYCLES * STEP_SIZE, learning_rates=[MAX_LR], ax=ax)
        ax.set_ylim(0, 1.05 * MAX_LR)
        ax.set_title(f"Cyclical: {mode}\nSmith 2015, {'figure 2' if mode == 'triangular' else 'section 3.1'}")

    for ax, (title, pairs) in zip([first, second], RESTARTS.items(), strict=True):
        ax.set_yscale("log")
        ax.set_ylim(1e-4, 1e-1)
        for cycle_len, cycle_mult in pairs:
            build = partial(
                get_sgdr_schedule, cycle_len=cycle_len, cycle_mult=cycle_mult, steps_per_epoch=STEPS_PER_EPOCH
            )
            plot_schedule(
                build,
                num_training_steps=EPOCHS * STEPS_PER_EPOCH,
                learning_rates=[ETA_MAX],
                steps_per_epoch=STEPS_PER_EPOCH,
                ax=ax,
            )
            ax.lines[-1].set(color=f"C{len(ax.lines) - 1}", label=f"T_0 = {cycle_len}")
        ax.legend(loc="upper center", ncols=3, frameon=False, fontsize="small", handlelength=1)
        ax.set_title(f"SGDR, {title}\nLoshchilov & Hutter 2016, figure 1")

    for ax, quantity in zip([rate, momentum], ["lr", "momentum"], strict=True):
        plot_schedule(
            ONE_CYCLE,
            num_training_steps=ONE_CYCLE_EPOCHS * STEPS_PER_EPOCH,
            learning_rates=[0.8],
            steps_per_epoch=STEPS_PER_EPOCH,
            quantity=quantity,
            ax=ax,
        )
    stlr.set_ylim(bottom=0)
    rate.set_ylim(bottom=0)
    rate.set_title("One-cycle: rate\nSmith 2018")
    momentum.set_title("One-cycle: momentum\nSmith 2018")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="paper_schedules.png", help="the image to write (.png, .pdf or .svg)")
    output = parser.parse_args().output
    figure, axes = plt.subplots(2, 4, figsize=(17, 7), layout="constrained")
    draw(axes.flat)
    figure.savefig(output, dpi=110)
    print(f"Drawn: {output}")


if __name__ == "__main__":
    main()
