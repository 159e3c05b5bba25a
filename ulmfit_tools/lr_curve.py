"""What a learning-rate range test found: losses against rates, and the rates that they suggest. Pure arithmetic.

Why the usual readings say too much for Transformers: a sweep mixes up rate and time. It takes a handful of steps at
each rate, and what a few steps at a rate begin to spoil, hundreds of them do spoil. The default here reckons with the
number of steps that the training will take; see `lr_readings.endurance`.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ulmfit_tools.errors import InputError
from ulmfit_tools.lr_readings import READINGS, endurance, noise_of
from ulmfit_tools.lr_verdict import verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 0.5  # the smoothing's reach to either side, in powers of e of the rate
GRADES = ("low", "medium", "high")
CLEAR, SURE = 2.0, 4.0  # changes of the loss, in standard errors, that count as seen and as certain
SMALL = 0.01  # a change of the loss, as a share of it, that is next to none
BACK = 0.05  # how far above its first level the loss must be, as a share of it, to have lost all that it had gained
SHALLOW = 6.0  # how far below `back` the turn can be told from noise
LEARNED = 0.05  # a loss of this share of its level tells nothing more about the rates
APART = 4.0  # how far apart the limits of sweeps may lie before they say little
BEFORE = 10.0  # how far below its limit a sweep must begin to show what the loss was before


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A short training at one rate, from the same start as all others.

    Args:
        rate: The rate that the probe stands for in the planned training.
        peak: The highest rate of the probe itself, which is shorter than that training and so can bear more.
        loss: Its mean loss over the last quarter of its steps; None where it was not a number.
        error: The standard error of what the loss differs by from that of the probe at the suggestion, over the same
            batches; 0 for that probe itself.
    """

    rate: float
    peak: float
    loss: float | None
    error: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LRCurve:
    """The result of a learning-rate range test.

    Args:
        rates: The rate of the last layer group (the head) at each measured update, rising.
        losses: The loss after each of these updates.
        start_loss: The loss before the first.
        training_steps: Optimizer steps that the planned training takes.
        stopped: Why the test ended: "end", "diverged" or "nan".
        mode: "exponential" or "linear".
        loss_on: "training" or "evaluation" batches.
        steps: Optimizer steps that the test took, probes included.
        seconds: Wall time of them.
        rate_norm: The root of the sum of squares, over the layer groups that train, of a group's rate as a share of
            the head's; 1 for a head alone.
        width: The model's hidden size, where layers besides the head train, whole, with a kind of Adam; else None.
        label_entropy: The entropy of the labels in the batches, in nats: what a guess loses that knows how frequent
            each class is. None where labels are numbers, or several for a row.
        batch_size: Rows of an update, over all processes and accumulated batches.
        probes: What the confirmation tried; empty without one.
        repeats: Other sweeps over the same rates from the same start, on other batches. Every suggestion is the
            geometric mean over this sweep and them; they have no repeats and no probes of their own.

    Raises:
        InputError: The rates do not rise, are not as many as the losses, or are fewer than five.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    start_loss: float
    training_steps: int
    stopped: str = "end"
    mode: str = "exponential"
    loss_on: str = "training"
    steps: int = 0
    seconds: float = 0.0
    rate_norm: float = 1.0
    width: int | None = None
    label_entropy: float | None = None
    batch_size: int | None = None
    probes: tuple[Probe, ...] = ()
    repeats: tuple["LRCurve", ...] = ()

    def __post_init__(self) -> None:
        """Check the points."""
        rising = all(low < high for low, high in zip(self.rates, self.rates[1:], strict=False))
        if len(self.rates) != len(self.losses) or len(self.rates) < 5 or not rising or self.rates[0] <= 0:
            raise InputError(
                "A curve needs at least five rising rates with a loss each; did the loss diverge at once? Begin lower."
                f" Received: {len(self.rates)} rates, {len(self.losses)} losses"
            )

    # What the losses look like without their noise

    @cached_property
    def smoothed(self) -> tuple[float, ...]:
        """An exponential moving average over the rates in both directions, which lags behind in none.

        `s_i = sum_j w_ij l_j` with `w_ij` in proportion to `exp(-|ln r_i - ln r_j| / SMOOTHING)`. Dividing by the sum
        of the weights corrects the bias towards the beginning, as Adam's averages are corrected.
        """
        return tuple((self._weights @ np.array(self.losses)).tolist())

    @cached_property
    def standard_errors(self) -> tuple[float, ...]:
        """The standard error of each smoothed loss, from how far the losses around it lie from the smoothed ones."""
        squares = self._weights**2
        residuals = np.array(self.losses) - np.array(self.smoothed)
        left = 1 - 2 * np.diag(self._weights) + squares.sum(1)  # a residual's share of the variance, for equal noise
        alone = left < 1e-6  # a linear sweep's first rate has no other near it to differ from: by the noise of all
        variances = np.where(alone, noise_of(self.losses) ** 2, residuals**2 / np.where(alone, 1.0, left))
        return tuple(np.sqrt(squares @ variances).tolist())

    @cached_property
    def _weights(self) -> np.ndarray:
        at = np.log(np.array(self.rates))
        weights = np.exp(-np.abs(at[:, None] - at[None, :]) / SMOOTHING)
        return weights / weights.sum(1, keepdims=True)

    @cached_property
    def level(self) -> float:
        """The loss before anything is learned: the median of the losses at rates next to nothing."""
        return float(np.median([self.start_loss, *self.losses[: self._next_to_nothing]]))

    @cached_property
    def _next_to_nothing(self) -> int:
        """How many losses are at rates next to nothing: a tenth of them, while the rate does not rise tenfold."""
        tenfold = int(np.searchsorted(self.rates, 10 * self.rates[0]))
        return min(max(4, len(self.losses) // 10), tenfold)

    @cached_property
    def noise(self) -> np.ndarray:
        """The standard error of each smoothed loss if all losses are as noisy as most: by their differences."""
        return noise_of(self.losses) * np.sqrt((self._weights**2).sum(1))

    @cached_property
    def lowest(self) -> int:
        """The index of the lowest smoothed loss."""
        return int(np.argmin(self.smoothed))

    @cached_property
    def fall(self) -> float:
        """How far the loss falls, from its level to its lowest; below 0 where it only rises."""
        return self.level - self.smoothed[self.lowest]

    @cached_property
    def gain(self) -> float:
        """The share of the loss that the sweep surely takes away; 0 where nobody knows, as the loss can be negative.

        What a new head loses by not knowing how frequent each class is does not count: of it, a few steps rid it. Nor
        does a standard error: the lowest of noisy losses lies below what is learned, most of all with rare classes.
        """
        known = math.inf if self.label_entropy is None else self.label_entropy
        before, after = min(self.level, known), self.smoothed[self.lowest] + self.standard_errors[self.lowest]
        return max(1 - after / before, 0.0) if self._ends_at_zero and before else 0.0

    @cached_property
    def _ends_at_zero(self) -> bool:
        """Whether 0 is the least that the loss can be, for all that one sees; not so of a log-density."""
        return min(self.start_loss, *self.losses) >= 0

    @cached_property
    def clearness(self) -> float:
        """How many standard errors the loss falls, from its level to its lowest."""
        # Of the first losses by the noise of all: a linear sweep's first rate has no other near it to differ from.
        before = self.noise[: self._next_to_nothing]
        error = math.hypot(self.standard_errors[self.lowest], float(np.mean(before)))
        rounding = 1e-12 * abs(self.level)  # of the sums: losses that are all the same neither fall nor rise
        return self.fall / error if error > rounding else (math.inf if self.fall > rounding else 0.0)

    @cached_property
    def learned(self) -> int | None:
        """The index from which the loss is next to nothing; None where it never is, or could be less.

        Without a loss there are no gradients, and rates that would ruin a training pass unseen.
        """
        nothing = np.flatnonzero(np.array(self.smoothed) < LEARNED * self.level)
        return int(nothing[0]) if nothing.size and self._ends_at_zero else None

    @cached_property
    def turn(self) -> int:
        """The index from which the loss rises: its lowest, or where nothing clearly falls, the last harmless one.

        Among many noisy losses on a level, the lowest may be any of them, and some rate will have a few bad batches in
        a row. So a rise is one that stands out from the noise of all losses, not only from that of its neighbours, and
        the lowest is looked for within two decades below it. Where the sweep has learned the rows, it is there.
        """
        if self.skips_over:
            return 0
        if self.learned is not None:
            return self.learned
        smoothed, rates = np.array(self.smoothed), np.array(self.rates)
        so_far = np.array([np.median(self.losses[: max(index + 1, 10)]) for index in range(len(rates))])
        risen = smoothed - so_far > np.maximum(SURE * self.noise, SMALL * abs(self.level))
        calm = max(int(np.argmax(risen)) if risen.any() else len(rates), 1)
        if self.is_clear:
            return int(np.argmin(np.where(rates >= rates[calm - 1] / 100, smoothed, math.inf)))
        above = smoothed[:calm] - float(np.median(self.losses[:calm]))
        harmless = np.flatnonzero(above <= np.maximum(self.noise[:calm] / 2, SMALL * abs(self.level)))
        return int(harmless[-1]) if harmless.size else 0

    @cached_property
    def back(self) -> float:
        """The rate at which the sweep has lost what it had gained: its loss is clearly above its first level.

        That is by 5 %, or by what stands out from the noise. Between two points by the logarithm of the rate; where
        the sweep ended before, its highest rate.
        """
        above = np.array(self.smoothed) - self.level - np.maximum(BACK * abs(self.level), SURE * self.noise)
        after = np.flatnonzero(above[self.turn :] > 0)
        if not after.size:
            return self.rates[-1]
        index = self.turn + int(after[0])
        if index == self.turn:
            return self.rates[index]
        logs = np.log(self.rates[index - 1 : index + 1])
        return math.exp(float(np.interp(0, above[index - 1 : index + 1], logs)))

    @cached_property
    def limit(self) -> float:
        """The rate that a sweep does not bear: its turn, or a sixth of `back` where that is higher.

        The turn says most, but noise moves it: a head that is trained already leaves a shallow valley, in which the
        lowest loss may be anywhere. Where the valley is clear, its lowest mostly lies within a factor of 6 of `back`.
        """
        return self.rates[self.turn] if self.learned is not None else max(self.rates[self.turn], self.back / SHALLOW)

    # What they suggest

    @cached_property
    def suggestions(self) -> dict[str, float]:
        """The default and the usual readings, by name."""
        readings = {name: self._mean(reading) for name, reading in READINGS.items()}
        return {"default": self.suggestion, **readings}

    @cached_property
    def suggestion(self) -> float:
        """The default: the best of the probes, by more than chance, or where there are none, `endurance`."""
        tried = [(probe.loss + CLEAR * probe.error, probe.rate) for probe in self.probes if probe.loss is not None]
        return min(tried)[1] if tried else self._mean(partial(endurance, sweeps=len(self.telling)))

    @property
    def sweeps(self) -> tuple["LRCurve", ...]:
        """This sweep and its repeats."""
        return (self, *self.repeats)

    def _mean(self, reading: Callable[["LRCurve"], float]) -> float:
        """The geometric mean of a reading over the sweeps that tell."""
        rates = [reading(sweep) for sweep in self.telling]
        return math.prod(rates) ** (1 / len(rates))

    @property
    def telling(self) -> list["LRCurve"]:
        """The sweeps that find a limit, where any does; else all."""
        return [sweep for sweep in self.sweeps if sweep._has_limit or not self.has_limit]

    @property
    def cyclical_range(self) -> tuple[float, float]:
        """The rates between which a cyclical schedule may go: a fourth of the suggestion, and the suggestion.

        Smith 2015, section 3.3: the lower bound is a third or a fourth of the upper one.
        """
        return self.suggestion / 4, self.suggestion

    @cached_property
    def confidence(self) -> str:
        """How sure the suggestion is: "high", "medium" or "low"; `verdict` says why.

        Of several sweeps it is the middle one's, and low where their limits lie far apart.
        """
        grades = sorted(sweep._grade for sweep in self.sweeps)
        far_apart = max(self._limits) > APART * min(self._limits)
        return "low" if far_apart or self.probes_leave_open else GRADES[grades[(len(grades) - 1) // 2]]

    @property
    def _grade(self) -> int:
        """How sure this sweep alone is: an index into `GRADES`."""
        if not self.is_clear or not self._has_limit or self.begins_late or self.skips_over:
            return 0
        return 2 if self.clearness >= SURE and self.learned is None else 1

    @property
    def is_clear(self) -> bool:
        """Whether the loss is seen to fall."""
        return self.clearness >= CLEAR

    @property
    def is_flat(self) -> bool:
        """Whether the loss is not seen to fall, and would not fall far if it did."""
        return not self.is_clear and self.fall < SMALL * abs(self.level)

    @property
    def begins_late(self) -> bool:
        """Whether the first rates may have changed the loss already, so that nobody sees where it began."""
        return self.limit < BEFORE * self.rates[0]

    @property
    def skips_over(self) -> bool:
        """Whether the rate that is too high lies between the first two, which are far apart in a linear sweep."""
        risen = self.smoothed[1] - self.level > max(BACK * abs(self.level), SURE * self.noise[1])
        return bool(risen) and self.rates[1] > BEFORE * self.rates[0]

    @property
    def _limits(self) -> list[float]:
        return [sweep.limit for sweep in self.sweeps]

    @property
    def has_limit(self) -> bool:
        """Whether any sweep shows from where on rates are too high; else the suggestion rests on the range swept."""
        return any(sweep._has_limit for sweep in self.sweeps)

    @property
    def _has_limit(self) -> bool:
        return self.turns_up or self.learned is not None

    @property
    def turns_up(self) -> bool:
        """Whether the test went on until the loss rose again."""
        return self.stopped != "end" or self._rises

    @property
    def _rises(self) -> bool:
        rise = self.smoothed[-1] - self.smoothed[self.lowest]
        return rise > max(CLEAR * self.standard_errors[-1], SMALL * abs(self.level))

    @property
    def ends_in_nan(self) -> bool:
        """Whether all that is seen of rates that are too high is a loss that is no number."""
        return self.stopped == "nan" and not self._rises

    @property
    def probes_leave_open(self) -> bool:
        """Whether no probe kept a finite loss, or the best of several is the one with the highest or lowest rate."""
        tried = sorted(probe.rate for probe in self.probes)
        failed = all(probe.loss is None for probe in self.probes)
        return bool(tried) and (failed or (len(tried) >= 3 and self.suggestion in (tried[0], tried[-1])))

    @cached_property
    def verdict(self) -> str:
        """What the curve can tell, in a sentence, and in others how far the sweeps agree and what probes left open."""
        return verdict(self)

    # In and out

    def to_json(self) -> str:
        """The measured values, with the suggestions beside them for whoever reads the file."""
        read = {"suggestions": self.suggestions, "confidence": self.confidence, "verdict": self.verdict}
        return json.dumps({**asdict(self), "read": read}, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "LRCurve":
        """The curve that `to_json` wrote.

        Raises:
            InputError: The text is not one.
        """
        try:
            values = json.loads(text)
            del values["read"]
            return cls._of(values)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"This is not the JSON of a range test: {error}") from error

    @classmethod
    def _of(cls, values: dict[str, Any]) -> "LRCurve":
        sequences: dict[str, Any] = {name: tuple(values[name]) for name in ("rates", "losses")}
        sequences["probes"] = tuple(Probe(**probe) for probe in values["probes"])
        sequences["repeats"] = tuple(cls._of(repeat) for repeat in values.get("repeats", ()))  # not in older files
        return cls(**{**values, **sequences})

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the losses, raw and smoothed, and the suggestions; see `reporting.lr_plot.plot_lr_curve`."""
        from ulmfit_tools.reporting.lr_plot import plot_lr_curve

        return plot_lr_curve(self, ax=ax)
