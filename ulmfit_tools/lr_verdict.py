"""What a range test's curve can tell, in sentences."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ulmfit_tools.lr_curve import LRCurve


def verdict(curve: "LRCurve") -> str:
    """What the curve can tell, in a sentence, and in others how far the sweeps agree and what probes left open."""
    return " ".join(filter(None, (_of_curve(curve), _of_repeats(curve), _of_probes(curve))))


def _of_curve(curve: "LRCurve") -> str:
    turn = f"{curve.rates[curve.turn]:.1e}"
    if curve.learned is not None:
        return (
            f"The loss falls to next to nothing by {turn}, so higher rates cannot be told apart: the rows are easily "
            "learned, and a rate up to the suggestion will do."
        )
    if curve.skips_over:
        return (
            f"At the second rate, {curve.rates[1]:.1e}, the loss has risen already, and between it and the first, "
            f"{curve.rates[0]:.1e}, none was tried: take exponential steps, or lower end_lr."
        )
    if curve.begins_late:
        return f"The first rate that is too high, {curve.limit:.1e}, is near the first one: lower start_lr."
    if curve.is_clear and curve.turns_up:
        end = f"is no number any more after {curve.rates[-1]:.1e}" if curve.ends_in_nan else f"turns up at {turn}"
        return f"The loss falls by {curve.fall:.3g}, {curve.clearness:.1f} standard errors, and {end}."
    if curve.is_clear:
        bound = "" if curve.has_limit else "; what is suggested is a lower bound"
        return f"The loss still falls at the highest rate: raise end_lr{bound}."
    told = f"noisy to decide: the loss falls by {curve.clearness:.1f} standard errors only"
    told = "The curve is too " + ("flat to decide: the loss does not fall at any rate" if curve.is_flat else told)
    if not curve.turns_up:
        return f"{told}, nor does it rise: raise end_lr, or take more steps."
    more = "eval_batches" if curve.repeats else "num_sweeps or eval_batches"
    return f"{told}. Where it rises ({turn} to {curve.back:.1e}) is what there is to go by; {more} would help."


def _of_repeats(curve: "LRCurve") -> str:
    if not curve.repeats:
        return ""
    told = f"That is the first of {len(curve.sweeps)} sweeps;"
    limits = [sweep.limit for sweep in curve.telling]
    if len(limits) < len(curve.sweeps):
        return f"{told} a limit is found by {len(limits)} ({', '.join(f'{limit:.1e}' for limit in limits)})."
    told += f" their limits are {min(limits):.1e} to {max(limits):.1e}"
    return f"{told}." if _before_probes(curve) else f"{told}, and the suggestion is the mean of theirs."


def _of_probes(curve: "LRCurve") -> str:
    if not curve.probes_leave_open:
        return ""
    if all(probe.loss is None for probe in curve.probes):
        return "No probe kept a finite loss: take a lower rate than the one suggested."
    lowest = curve.suggestion == min(probe.rate for probe in curve.probes)
    edge, beyond = ("lowest", "lower") if lowest else ("highest", "higher")
    before = _before_probes(curve)
    instead = f", instead of the {before:.1e} of the curve" if before else ""
    return f"The best of the probes is the {edge}{instead}, so a {beyond} rate may be better still."


def _before_probes(curve: "LRCurve") -> float | None:
    """What the sweeps suggested, where the probes suggest another rate."""
    tried = sorted(probe.rate for probe in curve.probes)
    middle = tried[len(tried) // 2] if tried else curve.suggestion
    return None if middle == curve.suggestion else middle
