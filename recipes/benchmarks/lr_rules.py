"""The rules of others that `lr_suggestions.py` compares with."""

import numpy as np

from ulmfit_tools.lr_curve import LRCurve
from ulmfit_tools.lr_readings import valley_index

# From their definitions, on curves that were swept with their settings. They pair a loss with the
# rate of the update after it, so the loss before the first update belongs to the first rate.


def averaged(curve: LRCurve, beta: float) -> np.ndarray:
    """The losses as they smooth them: an exponential moving average, corrected for its bias."""
    losses = np.array([curve.start_loss, *curve.losses[:-1]])
    total, averages = 0.0, []
    for count, loss in enumerate(losses, 1):
        total = beta * total + (1 - beta) * loss
        averages.append(total / (1 - beta**count))
    return np.array(averages)


def torch_lr_finder(curve: LRCurve) -> float:
    """`LRFinder.plot`, steepest: the first loss as it is, then 0.05 of each new one; 10 points and 5 are left out."""
    smooth = [curve.start_loss]
    for loss in curve.losses[:-1]:
        smooth.append(0.05 * loss + 0.95 * smooth[-1])
    return curve.rates[10 + int(np.gradient(smooth[10:-5]).argmin())]


def lightning(curve: LRCurve) -> float:
    """`_LRFinder.suggestion`: steepest, with a beta of 0.98; 10 points and 1 are left out."""
    return curve.rates[10 + int(np.gradient(averaged(curve, 0.98)[10:-1]).argmin())]


def fastai_valley(curve: LRCurve) -> float:
    """`valley`, with a beta of 0.98; 10 points and 5 are left out."""
    return curve.rates[10 + valley_index(averaged(curve, 0.98)[10:-5].tolist())]


def fastai_minimum(curve: LRCurve) -> float:
    """`minimum`, with a beta of 0.98: a tenth of the rate with the lowest loss."""
    return curve.rates[10 + int(averaged(curve, 0.98)[10:-5].argmin())] / 10
