"""Curves of range tests whose answer is known."""

import numpy as np

from ulmfit_tools.lr_curve import LRCurve

RATES = tuple(1e-7 * 10 ** (step / 12.5) for step in range(75))  # 12.5 steps in a factor of ten


def curve_of(loss, noise=0.0, seed=0, rates=RATES, **settings):
    """A curve whose loss is a function of the rate, with normal noise."""
    random = np.random.default_rng(seed)
    losses = tuple(float(loss(rate) + noise * random.standard_normal()) for rate in rates)
    settings = {"start_loss": loss(rates[0] / 10), "training_steps": 300, "stopped": "diverged", **settings}
    return LRCurve(rates=rates, losses=losses, **settings)


def falls_and_rises(rate):
    """2 at low rates, falls around 1e-4 and rises again steeply after 1e-3."""
    return 2 - 1.5 / (1 + 1e-4 / rate) + (rate / 3e-3) ** 2


def falling_curve(**settings):
    return curve_of(falls_and_rises, noise=0.02, **settings)
