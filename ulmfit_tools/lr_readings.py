"""The rates that one sweep suggests: the default, the usual readings, and when a sweep has nothing more to show."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ulmfit_tools.lr_curve import LRCurve

# What a training endures of the sweep's limit, the most that even a short one does, and the share of the loss that a
# sweep may take away without the training wanting less; see `endurance`.
ENDURED, LENGTH_POWER, MOST_ENDURED, GAINED = 3.96, 1 / 3, 0.6, 0.12
# The usual limit of a model one number wide, where a guess has a loss of 1, and batches one row; how it rises with
# that loss; and for how many sweeps it counts. See `usual_limit`.
USUAL, GUESS_POWER, USUAL_SWEEPS = 1 / 8, 3 / 4, 4


def endurance(curve: "LRCurve", sweeps: int = 1) -> float:
    """What a whole training of T steps endures of the rate that ends a sweep.

    It is `3.96 * limit / T ** (1 / 3) / rate_norm`, and at most 0.6 of the limit; and a share of that, `0.12 / gain`,
    where the sweep surely takes away more than 0.12 of the loss (times as much as it has more steps than the
    training). The limit is that of the sweep, drawn towards the usual one (`usual_limit`), which counts for four.

    A sweep takes a handful of steps at its limit, and what they begin to spoil, hundreds spoil. How fast the best rate
    falls with the number of steps lies between two cases. One step of Adam moves each weight by about the rate,
    however large the gradient is; steps in changing directions add up as in a random walk, and T steps go as far with
    a rate `T ** (-1 / 2)` as high. But where the loss pulls the weights back, they soon go no further, and the best
    rate does not depend on T at all.

    What a long training spoils little by little are all layers together; what ends a sweep is its fastest group. So a
    training bears more where rates fall towards the input, where the model has fewer layers, and where some are
    frozen: the suggestion is divided by `rate_norm`, in which the layer groups add up as in a random walk.

    What can be endured is wanted only where there is much to learn for the steps that there are. Where a sweep learns
    a good part on its way, a training has steps to spare, and lower rates end better.

    And of what sweeps differ in from start to start, only a part is what the best rates differ in; another is chance,
    by the batches that they meet. Over the starts of the benchmark the entropy of the labels says as much about the
    best rate as the limit of a sweep does, and the mean of both more than either.

    The 3.96 here, which is 1.4 for eight groups at one rate, was chosen on true curves of MiniLM on four datasets, 189
    steps from a new head and from a trained one, after sweeps of 100 steps over eight decades
    (recipes/benchmarks/lr_suggestions.py). The cube root is a judgement: of rates a factor of 2 apart, the one with
    the lowest held-out loss after 47 steps was once or twice the best one for 189 (eight of these starts), and single
    trainings of 570 to 1,080 steps were best at a half to the whole of it. That layer groups add up was seen on starts
    with two to six layers; that it also holds for a head alone was found afterwards. In a few dozen steps, though, a
    head learns as much at half of its limit as at the limit itself, in the next ones more, and leaves the layers below
    it a sweep that can be read (`stdlib-docs` and TREC, 1,000 rows, validation accuracy): hence the 0.6, which changes
    nothing else but one of the random starts. What a sweep may take away came from TREC and MPNet, whose best rates
    lay below what the rule said, and its 0.12 from all starts. The usual limit came last, chosen on all starts of the
    benchmark; its README says what it does to each task and each kind of starts when it is chosen on the others.

    Args:
        curve: One sweep.
        sweeps: How many there are of it.
    """
    endured = min(ENDURED / curve.training_steps**LENGTH_POWER / curve.rate_norm, MOST_ENDURED)
    enough = GAINED * max(1.0, len(curve.rates) / curve.training_steps)
    return _drawn(curve, sweeps) * endured * min(1.0, enough / max(curve.gain, enough))


def _drawn(curve: "LRCurve", sweeps: int) -> float:
    """A sweep's limit, drawn towards the usual one."""
    usual = usual_limit(curve)
    if usual is None:
        return curve.limit
    share = USUAL_SWEEPS / (USUAL_SWEEPS + sweeps)
    return curve.limit ** (1 - share) * usual**share


def usual_limit(curve: "LRCurve") -> float | None:
    """Where the limit lies on most data for such a model, such rates and such labels; None if not known.

    It is `label_entropy ** (3 / 4) * batch_size ** (1 / 2) / 8 / width / rate_norm`. Of networks in which Adam trains
    hidden layers the best rate falls as one over their width (Yang et al. 2022, arXiv:2203.03466, table 3), and rises
    as the root of the batch size (Malladi et al. 2022, arXiv:2205.10287); that the layers add up is said in
    `endurance`. The entropy of the labels is the loss of a guess, so what there is to be learned in the steps that
    there are; and unlike the loss itself it does not depend on the loss's scale, as Adam does not.
    """
    if curve.width is None or not curve.label_entropy or curve.batch_size is None:
        return None
    guess = curve.label_entropy**GUESS_POWER
    return USUAL * guess * math.sqrt(curve.batch_size) / curve.width / curve.rate_norm


def steepest(curve: "LRCurve") -> float:
    """The rate at which the loss falls fastest (Lightning, torch-lr-finder), for each power of e of the rate."""
    return curve.rates[int(np.argmin(_slopes(curve)))]


def still_falling(curve: "LRCurve") -> float:
    """Smith's reading: the highest rate at which the loss still clearly falls, at half its fastest or more."""
    slopes = _slopes(curve)
    return curve.rates[int(np.flatnonzero(slopes <= max(slopes.min() / 2, slopes.min()))[-1])]


def valley(curve: "LRCurve") -> float:
    """The middle of the longest fall (fastai's `valley`): half-way through its first two thirds."""
    return curve.rates[valley_index(curve.smoothed)]


def minimum_tenth(curve: "LRCurve") -> float:
    """A tenth of the rate with the lowest loss (fastai's `minimum`)."""
    return curve.rates[curve.lowest] / 10


def _slopes(curve: "LRCurve") -> np.ndarray:
    last = max(curve.turn, 1)
    return np.gradient(np.array(curve.smoothed[: last + 1]), np.log(np.array(curve.rates[: last + 1])))


def valley_index(losses: Sequence[float]) -> int:
    """Where fastai's `valley` lies: in the longest falling subsequence, half of two thirds from its beginning."""
    values = np.array(losses)
    lengths = np.ones(len(values), dtype=int)
    for index in range(1, len(values)):
        above = lengths[:index][values[:index] > values[index]]
        if above.size:
            lengths[index] = above.max() + 1
    end = int(np.argmax(lengths))
    begin = max(end - int(lengths[end]), 0)
    third = (end - begin) / 3
    return begin + int(third) + int(third / 2)


READINGS: dict[str, Callable[["LRCurve"], float]] = {
    "still_falling": still_falling,
    "steepest": steepest,
    "valley": valley,
    "minimum_tenth": minimum_tenth,
}


def has_diverged(losses: Sequence[float], beta: float = 0.9) -> bool:
    """Whether a rising sweep has nothing more to show, by the losses so far (the first one from before any update).

    Their exponential moving average, corrected for its bias, is as far above its lowest as it had fallen to it; where
    it had not fallen far, by half of its first value; and by more than noise makes of it.
    """
    if len(losses) < 10:
        return False
    average, averages = 0.0, []
    for count, loss in enumerate(losses, 1):
        average = beta * average + (1 - beta) * loss
        averages.append(average / (1 - beta**count))
    first = float(np.mean(losses[:5]))
    return averages[-1] > min(averages) + max(first - min(averages), abs(first) / 2, 4 * noise_of(losses))


def noise_of(losses: Sequence[float]) -> float:
    """The standard deviation of a loss, by the differences of neighbours: 1.4826 / sqrt(2) of their median size."""
    return float(np.median(np.abs(np.diff(losses)))) * 1.05
