"""What a sweep suggests, by hand calculation and on curves whose answer is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from curves import RATES, curve_of, falling_curve, falls_and_rises

from ulmfit_tools.lr_curve import LRCurve
from ulmfit_tools.lr_readings import READINGS, endurance, has_diverged, usual_limit, valley_index


def test_endurance_by_hand():
    """The level is 10, the turn at 1; half-way to the next point, at sqrt(10), the loss is back at 10.5.

    A sixth of that is below the turn: the turn is the limit, and 8,000 steps endure 3.96 / 20 of it. Of one low loss
    among high ones nobody knows how sure it is, so nothing counts as gained.
    """
    curve = LRCurve(
        rates=tuple(10.0**power for power in range(-20, 21)),  # so far apart that the smoothing changes little
        losses=(*[10.0] * 20, 0.0, *[21.0] * 20),
        start_loss=10.0,
        training_steps=8_000,
    )
    assert curve.rates[curve.turn] == 1
    assert curve.back == pytest.approx(10 ** (1 / 2), rel=0.01)
    assert curve.limit == 1
    assert curve.gain == 0
    assert curve.suggestion == pytest.approx(0.198)


def test_rates_that_fall_towards_the_input_bear_more():
    """Two groups, the other at 3/4 of the head's rate: the norm is 5/4, and with one rate the root of 2."""
    even, falling = falling_curve(rate_norm=math.sqrt(2)), falling_curve(rate_norm=5 / 4)
    assert falling.suggestion == pytest.approx(math.sqrt(2) / 1.25 * even.suggestion)
    assert falling_curve(rate_norm=1e-3).suggestion == pytest.approx(0.6 * even.limit * 0.12 / even.gain)  # the most


def test_four_times_the_layers_take_half_the_rate():
    few, many = falling_curve(rate_norm=math.sqrt(4)), falling_curve(rate_norm=math.sqrt(16))
    assert many.suggestion == pytest.approx(few.suggestion / 2)


def test_eight_times_the_steps_take_half_the_rate():
    once, more = (falling_curve(training_steps=steps) for steps in (300, 2400))
    assert once.suggestion == pytest.approx(2 * more.suggestion)


@pytest.mark.parametrize(("sweeps", "share"), [(1, 4 / 5), (2, 2 / 3), (3, 4 / 7)])
def test_the_usual_limit_counts_for_four_sweeps(sweeps, share):
    """Of 20 equal classes, 2.9957 ** 0.75 * 4 / 8 / 228 / 5, a thousandth of the sweep's; weights 1, 2 or 3 to 4."""
    one = LRCurve(
        rates=tuple(10.0**power for power in range(-20, 21)),
        losses=(*[10.0] * 20, *[9.0] * 10, *[21.0] * 11),
        start_loss=10.0,
        training_steps=8_000,
        rate_norm=5.0,
    )
    known = replace(one, width=228, batch_size=16, rates=tuple(rate / one.limit for rate in one.rates))
    known = replace(known, label_entropy=math.log(20))
    assert known.limit == pytest.approx(1)
    assert usual_limit(known) == pytest.approx(1e-3, rel=2e-3)
    both = replace(known, repeats=(known,) * (sweeps - 1))
    assert both.suggestion == pytest.approx(usual_limit(known) ** share * 3.96 / 20 / 5)


def test_the_usual_limit_rises_with_the_loss_of_a_guess_and_the_root_of_the_batch_size():
    """150 equal classes have a loss of 5.01 where one guesses, two 0.693: (5.01 / 0.693) ** (3 / 4) is 4.41."""
    known = {"width": 384, "label_entropy": math.log(2), "batch_size": 8}
    usual = usual_limit(falling_curve(**known))
    assert usual_limit(falling_curve(**known | {"label_entropy": math.log(150)})) / usual == pytest.approx(
        4.41, rel=1e-3
    )
    assert usual_limit(falling_curve(**known | {"batch_size": 32})) / usual == pytest.approx(2)
    for name in known:
        assert usual_limit(falling_curve(**known | {name: None})) is None
    assert usual_limit(falling_curve(**known | {"label_entropy": 0.0})) is None, "all rows met were of one class"


@pytest.mark.parametrize(("share", "training_steps", "wanted"), [(0.1, 8000, 1), (0.24, 8000, 0.5), (0.24, 25, 0.82)])
def test_what_a_sweep_learns_a_training_need_not_be_fast_for(share, training_steps, wanted):
    """The loss falls by this share: what is above 0.12 counts, and with 25 steps for the sweep's 41, above 0.197."""
    curve = LRCurve(
        rates=tuple(10.0**power for power in range(-20, 21)),
        losses=(*[10.0] * 20, *[10.0 * (1 - share)] * 10, *[21.0] * 11),
        start_loss=10.0,
        training_steps=training_steps,
        rate_norm=4.0,
    )
    assert curve.gain == pytest.approx(share)
    assert curve.suggestion == pytest.approx(wanted * curve.limit * 0.99 / training_steps ** (1 / 3))


@pytest.mark.parametrize(
    ("entropy", "lowest", "gain"),
    [(None, 3, 0.7), (12, 3, 0.7), (4, 3, 0.25), (4, 4.5, 0), (0, 3, 0)],
)
def test_to_learn_how_frequent_the_classes_are_is_no_gain(entropy, lowest, gain):
    """A new head loses 10 at first, a guess by the classes' shares 4: of a fall to 3 only 1 in 4 is learned.

    Where all rows are of one class there is nothing else to learn.
    """
    curve = LRCurve(
        rates=tuple(10.0**power for power in range(-20, 21)),
        losses=(*[10.0] * 20, *[lowest] * 10, *[21.0] * 11),
        start_loss=10.0,
        training_steps=8_000,
        label_entropy=entropy,
    )
    assert curve.gain == pytest.approx(gain)
    assert curve.suggestion == pytest.approx(curve.limit * 0.198 * 0.12 / max(gain, 0.12))


def test_the_lowest_of_noisy_losses_is_hardly_a_gain():
    """The loss is 1 at all rates; of 75, with a standard deviation of 0.2, the lowest smoothed one is near 0.87."""
    curves = [curve_of(lambda rate: 1.0, noise=0.2, seed=seed) for seed in range(20)]
    assert np.mean([1 - min(curve.smoothed) / curve.level for curve in curves]) > 0.1
    assert np.mean([curve.gain for curve in curves]) < 0.07


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("seed", range(5))
def test_suggestion_survives_noise(noise, seed):
    """The loss turns up at 1e-3 (where its derivative is 0, about 6e-4); noise may move the turn by a factor."""
    found = curve_of(falls_and_rises, noise=noise, seed=seed)
    exact = curve_of(falls_and_rises)
    assert 0.4 < found.suggestion / exact.suggestion < 2.5
    assert found.confidence == "high"


def test_readings_stand_in_their_order():
    read = falling_curve().suggestions
    assert list(read) == ["default", *READINGS]
    assert read["steepest"] <= read["still_falling"] <= 10 * read["minimum_tenth"]
    assert read["minimum_tenth"] * 10 == pytest.approx(RATES[falling_curve().lowest])


def test_steepest_is_where_the_loss_falls_fastest_for_the_logarithm_of_the_rate():
    """-1 / (1 + c / r) in ln r is a logistic curve, steepest at r = c."""
    curve = curve_of(lambda rate: -1 / (1 + 1e-4 / rate))
    assert READINGS["steepest"](curve) == pytest.approx(1e-4, rel=0.25)


def fastai_valley(losses):
    """The definition in fastai's `valley`, as published."""
    n = len(losses)
    max_start = max_end = 0
    lengths = [1] * n
    for i in range(1, n):
        for j in range(i):
            if losses[i] < losses[j] and lengths[i] < lengths[j] + 1:
                lengths[i] = lengths[j] + 1
            if lengths[max_end] < lengths[i]:
                max_end = i
                max_start = max_end - lengths[max_end]
    sections = (max_end - max_start) / 3
    return max_start + int(sections) + int(sections / 2)


@pytest.mark.parametrize("seed", range(20))
def test_valley_is_fastais(seed):
    losses = np.random.default_rng(seed).standard_normal(40) - np.linspace(0, 2, 40)
    losses[30:] += np.linspace(0, 8, 10)
    assert valley_index(losses.tolist()) == max(fastai_valley(losses.tolist()), 0)


@pytest.mark.parametrize("stopped", ["end", "diverged", "nan"])
@pytest.mark.parametrize("losses", [range(6), range(6, 0, -1), [1.0] * 6, [5, 0, 5, 0, 5, 0], [0, 9, 9, 9, 9, 9]])
def test_every_rule_gives_a_rate_within_the_sweep_or_below(losses, stopped):
    rates = tuple(10.0**power for power in range(-6, 0))
    curve = LRCurve(rates=rates, losses=tuple(map(float, losses)), start_loss=1.0, training_steps=50, stopped=stopped)
    for name, rule in {"endurance": endurance, **READINGS}.items():
        assert 0 < rule(curve) <= rates[-1], name
    assert curve.verdict.endswith(".")
    assert curve.confidence in ("low", "medium", "high")


def sweep_until_divergence(losses):
    for count in range(1, len(losses) + 1):
        if has_diverged(losses[:count]):
            return count
    return None


def test_a_sweep_is_ended_once_its_gain_is_lost():
    losses = [falls_and_rises(rate) for rate in [*RATES, 1.0]]
    end = sweep_until_divergence(losses)
    assert end is not None
    assert RATES[end] > 1e-3
    assert losses[end - 1] > 2


@pytest.mark.parametrize("seed", range(10))
def test_noise_alone_is_no_divergence(seed):
    noise = np.random.default_rng(seed).standard_normal(100)
    assert sweep_until_divergence((0.01 + 0.02 * noise).tolist()) is None
    assert sweep_until_divergence((1.8 - 0.005 * np.arange(100) + 0.1 * noise).tolist()) is None


def test_losses_below_zero_can_diverge():
    assert sweep_until_divergence([-1.0] * 20 + [-1.0 + 0.5 * step for step in range(20)])
