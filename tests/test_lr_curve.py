"""What a curve of losses suggests, by hand calculation and on curves whose answer is known."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from curves import RATES, curve_of, falling_curve, falls_and_rises

from ulmfit_tools.errors import InputError
from ulmfit_tools.lr_curve import CLEAR, SMOOTHING, SURE, LRCurve, Probe
from ulmfit_tools.lr_range import sweep_rates
from ulmfit_tools.lr_readings import noise_of


def test_smoothing_is_a_weighted_mean_with_weights_that_sum_to_one():
    rates = (1.0, math.e, math.e**3, math.e**4, math.e**6)
    losses = (1.0, 5.0, 2.0, 4.0, 3.0)
    curve = LRCurve(rates=rates, losses=losses, start_loss=1.0, training_steps=1)
    logs = (0, 1, 3, 4, 6)
    for index, at in enumerate(logs):
        weights = [math.exp(-abs(at - other) / SMOOTHING) for other in logs]
        mean = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
        assert curve.smoothed[index] == pytest.approx(mean)


def test_smoothing_keeps_a_constant_and_does_not_lag():
    assert curve_of(lambda rate: 1.7).smoothed == pytest.approx([1.7] * len(RATES))
    symmetric = curve_of(lambda rate: abs(math.log(rate / RATES[37])))
    assert symmetric.lowest == 37


def test_standard_error_is_that_of_the_mean_of_noise():
    """For equal noise of standard deviation 1, the error of a weighted mean is the root of the sum of squares."""
    errors = np.array([curve_of(lambda rate: 0.0, noise=1.0, seed=seed).standard_errors for seed in range(300)])
    reach = np.array([sum(math.exp(-abs(j) * math.log(10) / 12.5 / SMOOTHING) for j in range(-37, 38))])
    squares = sum(math.exp(-2 * abs(j) * math.log(10) / 12.5 / SMOOTHING) for j in range(-37, 38))
    expected = math.sqrt(squares) / reach[0]
    assert np.sqrt((errors[:, 37] ** 2).mean()) == pytest.approx(expected, rel=0.05)


def test_the_limit_of_a_shallow_valley_is_a_sixth_of_where_the_gain_is_lost():
    """The loss is 5 up to 0.1, 10 as before the fall at 1, and 11 at 10; neighbours weigh 0.01.

    So the smoothed losses are (10 + 0.16) / 1.02 = 9.96 at 1 and (11 + 0.21) / 1.02 = 10.99 at 10, with 10.5 at 0.524
    of the way between them.
    """
    curve = LRCurve(
        rates=tuple(10.0**power for power in range(-20, 21)),
        losses=(*[10.0] * 15, *[5.0] * 5, 10.0, *[11.0] * 20),
        start_loss=10.0,
        training_steps=8_000,
    )
    assert curve.rates[curve.turn] < 0.1
    assert curve.back == pytest.approx(10**0.524, rel=0.01)
    assert curve.limit == curve.back / 6


@pytest.mark.parametrize("constant", [-12.0, -2.5, -1.99, -0.9])
def test_a_loss_that_may_be_negative_suggests_what_it_does_with_a_constant_added(constant):
    """A log-density: no share of it is gained, and where it passes 0 nothing is learned."""
    curve, shifted = (
        curve_of(lambda rate, c=c: falls_and_rises(rate) + c, start_loss=2 + c) for c in (constant, 12.0)
    )
    assert min(curve.losses) < 0
    assert curve.gain == 0
    assert curve.learned is None
    assert curve.confidence == "high"
    assert shifted.gain < 0.15
    assert curve.suggestion == pytest.approx(shifted.suggestion, rel=0.2)


def test_the_loss_need_not_come_back():
    assert curve_of(lambda rate: 2 - 1.5 / (1 + 1e-4 / rate), stopped="end").back == RATES[-1]


def test_noise_at_the_level_is_no_loss_of_the_gain():
    """A loss of 0.8 varies by a quarter of itself: 5 % above it are soon there by chance, four standard errors not."""

    def only_rises(rate):
        return 0.8 + 0.3 * (rate / 4e-3) ** 2

    backs = [curve_of(only_rises, noise=0.2, seed=seed, rates=RATES[:64]).back for seed in range(40)]
    assert sorted(backs)[4] > 1e-3  # the exact loss is 5 % up at 1.5e-3, and four errors of 0.06 at 3.7e-3


def test_the_level_of_a_linear_sweep_is_that_of_its_beginning():
    """A tenth of these rates reach to 1e-3, where all is learned; only the first is next to nothing."""
    curve = curve_of(falls_and_rises, rates=tuple(np.linspace(1e-6, 1e-2, 100)), start_loss=2.0)
    assert curve.level == pytest.approx(2, abs=0.02)
    assert 1e-3 < curve.back < 5e-3  # exactly 3.8e-3; the smoothing spreads the rise to lower rates


def test_noise_moves_the_limit_less_than_the_turn():
    """A trained head: the loss falls by little more than its noise, from 1e-5 on, and is back at its level at 3e-3."""

    def shallow(rate):
        return 2 - 0.35 * min(1, max(0, math.log10(rate / 1e-5))) + 0.35 * (rate / 3e-3) ** 2

    rates = RATES[:64]  # to 1e-2, where the loss has doubled and the sweep is ended
    curves = [curve_of(shallow, noise=0.3, seed=seed, rates=rates) for seed in range(40)]
    turns, limits = (
        np.log(values) for values in zip(*[(curve.rates[curve.turn], curve.limit) for curve in curves], strict=True)
    )
    assert np.std(limits) < 0.7 * np.std(turns)
    exact = curve_of(shallow, rates=rates).limit
    assert exact / 1.5 < math.exp(np.median(limits)) < exact * 1.5


def test_a_flat_curve_says_so():
    curve = curve_of(lambda rate: 0.7, noise=1e-3, stopped="end")
    assert curve.clearness < CLEAR
    assert curve.confidence == "low"
    assert "too flat" in curve.verdict
    assert "raise end_lr" in curve.verdict


def test_noise_does_not_pull_the_turn_to_low_rates():
    """A head that is trained already: nothing falls, and the loss of a batch varies by a quarter of itself.

    The exact loss has risen by 1 % of the level at 6.5e-4, and by half of the noise at 2.3e-3. Of 40 seeds, a few may
    lie a decade off, but none at the beginning, where chance finds a lowest loss as easily as anywhere.
    """

    def only_rises(rate):
        return 0.8 + 0.3 * (rate / 4e-3) ** 2

    rates = RATES[:59]  # to 4.4e-3
    curves = [curve_of(only_rises, noise=0.2, seed=seed, rates=rates) for seed in range(40)]
    turns = [curve.rates[curve.turn] for curve in curves]
    assert sum(6.5e-5 < turn < 3e-3 for turn in turns) >= 32
    assert min(turns) > 1e-6


def test_a_curve_that_only_rises_suggests_by_where_it_rises():
    """Harmless up to 1e-3; the smoothing spreads the rise to lower rates, which errs on the safe side."""
    curve = curve_of(lambda rate: 0.7 + max(0.0, math.log(rate / 1e-3)), noise=1e-3)
    assert "too flat" in curve.verdict
    assert curve.confidence == "low"
    assert 1e-4 < curve.rates[curve.turn] < 1e-3
    assert 1e-5 < curve.suggestion < 1e-3


def test_a_noisy_curve_says_so():
    curve = curve_of(lambda rate: falls_and_rises(rate) * 0.05 + 1, noise=0.5, seed=3)
    assert curve.confidence == "low"
    assert "noisy" in curve.verdict


def test_a_curve_that_still_falls_at_its_end_says_so():
    curve = curve_of(lambda rate: 2 - 1.5 / (1 + 1e-2 / rate), noise=0.01, stopped="end")
    assert curve.confidence == "low"
    assert "raise end_lr" in curve.verdict


@pytest.mark.parametrize(("first", "confidence"), [(2e-6, "high"), (2e-4, "low")])
def test_a_curve_that_begins_near_its_limit_says_so(first, confidence):
    """The loss turns at about 6e-4, three hundred times the one beginning and three times the other."""
    curve = falling_curve(rates=tuple(rate for rate in RATES if rate > first))
    assert 4e-4 < curve.limit < 1e-3
    assert curve.confidence == confidence
    assert ("lower start_lr" in curve.verdict) is (confidence == "low")


def test_cyclical_range_ends_at_the_suggestion():
    curve = falling_curve()
    assert curve.cyclical_range == (curve.suggestion / 4, curve.suggestion)


def test_the_best_probe_is_the_suggestion():
    probes = (
        Probe(rate=1e-4, peak=3e-4, loss=0.9),
        Probe(rate=2e-4, peak=6e-4, loss=0.4),
        Probe(rate=4e-4, peak=1e-3, loss=None),
    )
    assert falling_curve(probes=probes).suggestion == 2e-4
    assert falling_curve(probes=probes[2:]).suggestion == falling_curve().suggestion


@pytest.mark.parametrize(("error", "best"), [(0.021, 2e-4), (0.019, 4e-4)])
def test_a_probe_that_only_chance_makes_better_is_not_the_suggestion(error, best):
    """It is 0.04 better, two standard errors of 0.02."""
    probes = (Probe(rate=2e-4, peak=6e-4, loss=0.4), Probe(rate=4e-4, peak=1e-3, loss=0.36, error=error))
    assert falling_curve(probes=probes).suggestion == best


@pytest.mark.parametrize("loss", [falls_and_rises, lambda rate: 1 + rate, lambda rate: 1.7])
def test_a_rate_with_no_other_near_it_has_a_standard_error(loss):
    """A linear sweep from 1e-7 on: the second rate is a million times the first."""
    rates = (1e-7, *(0.1 * step for step in range(1, 100)))
    curve = curve_of(loss, noise=0.02, rates=rates, mode="linear")
    assert curve.standard_errors[0] == pytest.approx(noise_of(curve.losses))  # of one loss that is no mean
    assert math.isfinite(curve.clearness)


@pytest.mark.parametrize("value", [0.1, 1.7, 1e30, -3.3])
@pytest.mark.parametrize("mode", ["exponential", "linear"])
def test_losses_that_are_all_the_same_tell_nothing(value, mode):
    rates = sweep_rates(1e-7, 10, 57, mode)
    curve = curve_of(lambda rate: value, rates=tuple(rates), mode=mode)
    assert (curve.clearness, curve.confidence) == (0.0, "low")
    assert "too flat to decide" in curve.verdict


def test_a_clear_fall_is_clear_in_a_linear_sweep_too():
    """Its first rate stands alone, decades below the others: the fall after it is no noise."""
    rates = tuple(np.linspace(1e-7, 1e-2, 100).tolist())
    curve = curve_of(falls_and_rises, noise=0.02, rates=rates, mode="linear")
    assert curve.clearness > SURE
    assert rates[2] < curve.rates[curve.turn] < 3e-3


def test_probes_that_leave_a_question_open_say_so():
    def probed(*losses):
        probes = [
            Probe(rate=rate, peak=rate, loss=loss) for rate, loss in zip((1e-4, 4e-4, 1.6e-3), losses, strict=True)
        ]
        return falling_curve(probes=tuple(probes))

    assert probed(0.9, 0.4, 0.8).confidence == falling_curve().confidence == "high"
    assert probed(0.9, 0.4, 0.8).verdict == falling_curve().verdict
    for losses, words in [
        ((0.9, 0.8, 0.4), "the highest, instead of the 4.0e-04 of the curve, so a higher rate may be better still"),
        ((0.4, 0.8, 0.9), "the lowest, instead of the 4.0e-04 of the curve, so a lower rate may be better still"),
        ((None, None, None), "No probe kept a finite loss"),
    ]:
        assert probed(*losses).confidence == "low"
        assert words in probed(*losses).verdict


def shifted(factor, **settings):
    """The falling curve with all that happens at `factor` times the rate."""
    return curve_of(lambda rate: falls_and_rises(rate / factor), **settings)


def test_several_sweeps_suggest_their_geometric_mean():
    one, other = shifted(1), shifted(4)
    both = replace(one, repeats=(other,))
    assert other.limit > 3 * one.limit
    for name, rate in both.suggestions.items():
        assert rate == pytest.approx(math.sqrt(one.suggestions[name] * other.suggestions[name]))
    assert replace(one, repeats=(one, one)).suggestion == pytest.approx(one.suggestion)
    probed = replace(both, probes=(Probe(rate=2e-4, peak=2e-4, loss=0.4), Probe(rate=1e-4, peak=1e-4, loss=0.5)))
    assert probed.suggestion == 2e-4


def test_several_sweeps_say_how_far_they_agree():
    flat = curve_of(lambda rate: 2 + (rate / 3e-3) ** 2)
    sure = shifted(1)
    assert (flat.confidence, sure.confidence) == ("low", "high")
    assert sure.limit / 4 < flat.limit < 4 * sure.limit
    assert replace(sure, repeats=(flat, sure)).confidence == "high"
    assert replace(sure, repeats=(flat, flat)).confidence == "low"
    assert replace(sure, repeats=(flat,)).confidence == "low", "of two, the less sure"
    near, far = replace(sure, repeats=(shifted(3),)), replace(sure, repeats=(shifted(8),))
    assert (near.confidence, far.confidence) == ("high", "low")
    assert f"first of 2 sweeps; their limits are {sure.limit:.1e} to {shifted(3).limit:.1e}" in near.verdict
    assert "sweeps" not in sure.verdict


def test_rows_that_the_sweep_learns_hide_what_high_rates_do():
    """The loss is 2 at its beginning; at 1e-4 it falls to 0.01, and only at 0.1 it rises: 1e-4 is the limit."""
    losses = [2.0] * 20 + [0.01] * 30 + [5.0] * 2
    rates = tuple(1e-8 * 100 ** (step / 10) for step in range(20)) + tuple(
        1e-4 * 10 ** (step / 10) for step in range(32)
    )
    curve = LRCurve(rates=rates, losses=tuple(losses), start_loss=2.0, training_steps=2, stopped="diverged")
    assert curve.rates[curve.turn] == pytest.approx(1e-4, rel=1)
    assert curve.limit == curve.rates[curve.turn]
    assert curve.suggestion == pytest.approx(0.6 * curve.limit), "the most, as for two steps"
    assert curve.confidence == "medium"
    assert "next to nothing by" in curve.verdict
    for end in (
        replace(curve, stopped="end"),
        replace(curve, rates=rates[:50], losses=tuple(losses[:50]), stopped="end"),
    ):
        assert end.suggestion == curve.suggestion
        assert end.has_limit


def test_a_sweep_without_a_limit_leaves_the_mean_to_the_others():
    endless = curve_of(lambda rate: 2.0 - 1e-3 * math.log(rate), stopped="end")
    sure = shifted(1)
    assert not endless.has_limit
    assert replace(endless, repeats=(sure,)).suggestion == sure.suggestion
    assert replace(endless, repeats=(endless,)).suggestion == pytest.approx(endless.suggestion)
    assert not replace(endless, repeats=(endless,)).has_limit


def test_json_gives_the_same_curve_back():
    repeated = replace(falling_curve(), repeats=(shifted(2), shifted(3)))
    assert LRCurve.from_json(repeated.to_json()) == repeated
    older = json.loads(falling_curve().to_json())
    del older["repeats"]
    assert LRCurve.from_json(json.dumps(older)) == falling_curve()
    curve = falling_curve(probes=(Probe(rate=1e-4, peak=3e-4, loss=None),), steps=99, seconds=1.25, mode="linear")
    again = LRCurve.from_json(curve.to_json())
    assert again == curve
    assert again.suggestions == curve.suggestions
    assert json.loads(curve.to_json())["read"]["suggestions"] == curve.suggestions


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"read": 1, "probes": [{"rate": 1}]}'])
def test_other_json_is_refused(text):
    with pytest.raises(InputError, match="range test"):
        LRCurve.from_json(text)


@pytest.mark.parametrize(
    "rates", [(1.0, 2.0), (1.0, 2.0, 2.0, 3.0, 4.0), (5.0, 4.0, 3.0, 2.0, 1.0), (0.0, 1, 2, 3, 4)]
)
def test_points_that_are_no_curve_are_refused(rates):
    with pytest.raises(InputError, match="five rising rates"):
        LRCurve(rates=rates, losses=(1.0,) * len(rates), start_loss=1.0, training_steps=1)


@pytest.mark.parametrize("limit", [1e-4, 1e-3, 1e-2])
def test_a_linear_sweep_that_skips_the_rates_in_question_says_so(limit):
    """Its second rate is 0.1, where the loss of 2 is at 9 already."""

    def loss(rate):
        return min(2 - min(1, rate / limit) + 2 * max(0, rate / limit - 1), 9)

    curve = curve_of(loss, noise=0.1, rates=tuple(np.linspace(1e-7, 10, 100))[:12], mode="linear")
    assert curve.limit < 0.1
    assert curve.confidence == "low"
    assert curve.verdict.startswith("At the second rate, 1.0e-01, the loss has risen already")


def test_a_loss_that_only_ends_as_no_number_does_not_turn_up():
    def falls(rate):
        return 5 - 4 * (1 - math.exp(-rate / 1e-3))

    curve = curve_of(falls, noise=0.02, rates=RATES[:64], stopped="nan")
    assert curve.has_limit
    assert curve.verdict.endswith(f"and is no number any more after {RATES[63]:.1e}.")


def test_the_verdict_tells_which_sweeps_and_which_rate_count():
    endless = curve_of(lambda rate: 2.0 - 1e-3 * math.log(rate), noise=1e-5, stopped="end")
    some = replace(endless, repeats=(shifted(1),))
    assert some.suggestion == pytest.approx(shifted(1).suggestion)
    assert "lower bound" in endless.verdict
    assert "lower bound" not in some.verdict
    assert some.verdict.endswith(f"That is the first of 2 sweeps; a limit is found by 1 ({shifted(1).limit:.1e}).")
    two = replace(shifted(1), repeats=(shifted(2),))
    assert two.verdict.endswith("and the suggestion is the mean of theirs.")
    losses = {two.suggestion / 4: 0.9, two.suggestion: 0.8, two.suggestion * 4: 0.4}
    probed = replace(two, probes=tuple(Probe(rate=rate, peak=rate, loss=loss) for rate, loss in losses.items()))
    assert probed.suggestion == 4 * two.suggestion
    assert "mean of theirs" not in probed.verdict
    assert f"the highest, instead of the {two.suggestion:.1e} of the curve" in probed.verdict
