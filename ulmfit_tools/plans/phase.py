"""A phase: which layer groups train, at which rates, for how long. One ordinary `Trainer` run."""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.trainer_utils import SchedulerType

from ulmfit_tools.data.augmentation import DEFAULT_AUGMENTATION, Augmentation
from ulmfit_tools.errors import InputError, nearest
from ulmfit_tools.schedules import SCHEDULES, check_schedule

LearningRate = float | tuple[float, float] | str

# What `train` may say in words; a number means that many groups from the top, a list names the groups.
TRAIN_WORDS = ("all", "head", "top_half", "each")
RATE_WORDS = ("auto", "previous")
KEEP_CHOICES = ("last", "best")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class UntilOverfit:
    """End of a phase by the validation loss: it stops once the loss has turned up.

    Args:
        patience: Evaluations in a row that may pass without a new lowest validation loss. Under the schedule `sgdr`,
            whose restarts raise the loss for a while, the evaluations at the ends of its cycles are counted.
        min_delta: How much lower than the lowest so far a loss must be to count, in units of the loss.
        max_epochs: The phase ends here at the latest. A schedule that needs a length is laid out over it.
    """

    patience: int = 2
    min_delta: float = 0.0
    max_epochs: float = 20.0

    def __post_init__(self):
        """Check the values."""
        if not _is_count(self.patience):
            raise InputError(f"until_overfit.patience must be a whole number from 1. Received: {self.patience!r}")
        _check_number("until_overfit.min_delta", self.min_delta, zero_allowed=True)
        _check_number("until_overfit.max_epochs", self.max_epochs)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One step of a plan. What is left out is taken from the run's training arguments.

    Args:
        name: Letters, digits, `-`, `_`, `.`; it names the phase's folder.
        train: The layer groups that train, all others are frozen: `all`, `head`, `top_half`, a number (that many
            groups from the top), a list of group names, or `each`: one phase for each group in turn, from the input
            to the output (Felbo et al. 2017, chain-thaw).
        epochs: Length in epochs; may be a fraction.
        steps: Length in optimizer steps. At most one of `epochs`, `steps` and `until_overfit` is given; with none,
            the training argument `num_train_epochs` says how long.
        until_overfit: Train until the validation loss turns up; the best checkpoint is kept, as by `keep: best`.
        learning_rate: Rate of the last group (the head); a span `(low, high)`: geometric spacing from the first group
            to the last; `auto`: what a range test at the start of the phase suggests, with its layers frozen; or
            `previous`: that of the phase before, whatever found it.
        factor: Each group's rate is that of the next one divided by this; 1 is one rate for all.
        num_groups: Merge the layer groups into this many before the rates are laid out.
        schedule: Name of a schedule: one of this package's or of `Trainer`'s own.
        schedule_settings: Settings of that schedule, such as `cycle_len` or `cut_frac`.
        keep: `last` or `best`: the weights that go on to the next phase. Best by the validation loss, or by the plan's
            `metric_for_best_model`: accuracy, f1_macro, f1_weighted or mcc. Under the schedule `sgdr` those of the
            ends of cycles are compared, and of the end of the training; of accuracies that differ by no more than
            chance would have it, the last is kept.
        precompute: Compute what leaves the frozen layers once for each row and train from that (`feature_cache`).
            Frozen layers then run without dropout. Where it cannot be done the phase says so and trains without.
        augment: Change the training texts on the fly, another way in each epoch; `true` for the default.
        note: One or more sentences that are logged when the phase begins and kept in the run's record.

    Raises:
        InputError: A value is not of the kind named above.
    """

    name: str
    train: str | int | Sequence[str] = "all"
    epochs: float | None = None
    steps: int | None = None
    until_overfit: UntilOverfit | None = None
    learning_rate: LearningRate | None = None
    factor: float | None = None
    num_groups: int | None = None
    schedule: str | None = None
    schedule_settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    keep: str = "last"
    precompute: bool = False
    augment: Augmentation | None = None
    note: str | None = None

    def __post_init__(self):
        """Check every field by itself; what depends on the model is checked in `groups_to_train`."""
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InputError(
                f"A phase's name has letters, digits, '-', '_' and '.': it names a folder. Received: {self.name!r}"
            )
        self._check_train()
        self._check_length()
        self._check_rates()
        if self.keep not in KEEP_CHOICES:
            raise InputError(f"{self._at('keep')} must be one of {', '.join(KEEP_CHOICES)}. Received: {self.keep!r}")
        if not isinstance(self.precompute, bool):
            raise InputError(f"{self._at('precompute')} is true or false. Received: {self.precompute!r}")
        if not isinstance(self.augment, Augmentation | None):
            raise InputError(f"{self._at('augment')} is an Augmentation or None. Received: {self.augment!r}")
        if not isinstance(self.note, str | None):
            raise InputError(f"{self._at('note')} is a text. Received: {self.note!r}")
        if self.until_overfit is not None and self.keep != "best":
            object.__setattr__(self, "keep", "best")  # past the turn the last weights are the overfitted ones
        self._check_schedule()

    def _at(self, key: str) -> str:
        return f"Phase '{self.name}': {key}"

    def _check_train(self) -> None:
        what = self.train
        if isinstance(what, str) and what not in TRAIN_WORDS:
            raise InputError(
                f"{self._at('train')} must be {', '.join(TRAIN_WORDS)}, a number of groups from the top or a list of "
                f"group names. Received: {what!r}.{nearest(what, TRAIN_WORDS)}"
            )
        if isinstance(what, bool) or (isinstance(what, int) and what < 1):
            raise InputError(f"{self._at('train')} as a number must be at least 1: the head. Received: {what!r}")
        if not isinstance(what, (str, int)):
            if not isinstance(what, Sequence) or not what or not all(isinstance(name, str) for name in what):
                raise InputError(f"{self._at('train')} as a list must name at least one group. Received: {what!r}")
            object.__setattr__(self, "train", tuple(what))

    def _check_length(self) -> None:
        given = [key for key in ("epochs", "steps", "until_overfit") if getattr(self, key) is not None]
        if len(given) > 1:
            raise InputError(f"{self._at(' and '.join(given))} exclude each other: give one")
        if self.epochs is not None:
            _check_number(self._at("epochs"), self.epochs)
        if self.steps is not None and not _is_count(self.steps):
            raise InputError(f"{self._at('steps')} must be a whole number from 1. Received: {self.steps!r}")

    def _check_rates(self) -> None:
        rate = self.learning_rate
        if isinstance(rate, (list, tuple)):
            if len(rate) != 2:
                raise InputError(f"{self._at('learning_rate')} as a span has two rates, [low, high]. Received: {rate}")
            low, high = (_check_number(self._at("learning_rate"), value) for value in rate)
            if low > high:
                raise InputError(f"{self._at('learning_rate')}: low must not be above high. Received: {list(rate)}")
            object.__setattr__(self, "learning_rate", (low, high))
            if self.factor is not None:
                raise InputError(f"{self._at('factor')} and a span of rates exclude each other: give one")
        elif isinstance(rate, str) and rate not in RATE_WORDS:
            raise InputError(
                f"{self._at('learning_rate')} is a positive number, a span [low, high], {' or '.join(RATE_WORDS)}."
                f"{nearest(rate, RATE_WORDS)} Received: {rate!r}"
            )
        elif rate is not None and not isinstance(rate, str):
            _check_number(self._at("learning_rate"), rate)
        if self.factor is not None:
            _check_number(self._at("factor"), self.factor)
        if self.num_groups is not None and not _is_count(self.num_groups):
            raise InputError(f"{self._at('num_groups')} must be a whole number from 1. Received: {self.num_groups!r}")

    def _check_schedule(self) -> None:
        names = [*SCHEDULES, *(known.value for known in SchedulerType)]
        if self.schedule is not None and self.schedule not in names:
            raise InputError(
                f"{self._at('schedule')} must be one of {', '.join(names)}. Received: {self.schedule!r}."
                f"{nearest(str(self.schedule), names)}"
            )
        if not isinstance(self.schedule_settings, dict):
            raise InputError(
                f"{self._at('schedule_settings')} must be a mapping. Received: {self.schedule_settings!r}"
            )
        if self.schedule_settings and self.schedule is None:
            raise InputError(f"{self._at('schedule_settings')} needs a schedule beside it: name one with 'schedule'")
        if self.schedule in SCHEDULES:
            check_schedule(self.schedule, self.schedule_settings)  # Trainer's own: `ULMFiTTrainingArguments`

    def groups_to_train(self, group_names: Sequence[str]) -> tuple[int, ...]:
        """The indices of the groups that train, for a model whose groups have these names (input to output).

        Raises:
            InputError: A named group does not exist, or more groups are asked for than there are.
        """
        count = len(group_names)
        if self.train == "head":
            return (count - 1,)
        if self.train == "top_half":
            return tuple(range(count - math.ceil(count / 2), count))
        if isinstance(self.train, int):
            if self.train > count:
                raise InputError(f"{self._at('train')}: the model has {count} layer groups. Received: {self.train}")
            return tuple(range(count - self.train, count))
        if isinstance(self.train, tuple):
            for name in self.train:
                if name not in group_names:
                    raise InputError(
                        f"{self._at('train')}: the model has no layer group {name!r}; it has "
                        f"{', '.join(group_names)}.{nearest(name, group_names)}"
                    )
            return tuple(sorted({list(group_names).index(name) for name in self.train}))
        return tuple(range(count))

    def expand(self, group_names: Sequence[str]) -> list["Phase"]:
        """The phases that this one stands for: itself, or one for each group where `train` is `each`."""
        if self.train != "each":
            return [self]
        return [dataclasses.replace(self, name=f"{self.name}-{name}", train=(name,)) for name in group_names]

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain values for YAML and JSON."""
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (
                value is None
                or value is False
                or value == {}
                or (field.name == "keep" and (value == "last" or self.until_overfit))
            ):
                continue
            if isinstance(value, (UntilOverfit, Augmentation)):
                value = dataclasses.asdict(value)
            values[field.name] = list(value) if isinstance(value, tuple) else value
        return values

    @classmethod
    def from_dict(cls, values: Any) -> "Phase":
        """A phase from a mapping as in a plan file.

        Raises:
            InputError: A key is unknown (the nearest is suggested), the name is missing, or a value is wrong.
        """
        allowed = [field.name for field in dataclasses.fields(cls)]
        check_keys(values, allowed, what="A phase")
        if "name" not in values:
            raise InputError(f"Every phase needs a name. Received: {values}")
        values = dict(values)
        for key, default in (("until_overfit", UntilOverfit()), ("augment", DEFAULT_AUGMENTATION)):
            values[key] = _from_mapping(values.get(key), default, what=key)
        if values.get("schedule_settings", {}) is None:  # the key alone, without a value
            values["schedule_settings"] = {}
        return cls(**values)


def _from_mapping(given: Any, default: Any, *, what: str) -> Any:
    """What a key of a phase stands for: true for the default, false for none, or a mapping of its fields."""
    if given is None or isinstance(given, bool):
        return default if given else None
    check_keys(given, [field.name for field in dataclasses.fields(default)], what=what)
    return type(default)(**given)


def check_keys(values: Any, allowed: Sequence[str], *, what: str) -> None:
    """Refuse anything but a mapping with the allowed keys, with the nearest one suggested."""
    if not isinstance(values, dict):
        raise InputError(f"{what} must be a mapping with the keys {', '.join(allowed)}. Received: {values!r}")
    for key in values:
        if key not in allowed:
            raise InputError(f"{what} has no key {key!r}; it may have {', '.join(allowed)}.{nearest(key, allowed)}")


def _check_number(what: str, value: Any, *, zero_allowed: bool = False) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not zero_allowed):
        raise InputError(f"{what} must be a {'' if zero_allowed else 'positive '}number. Received: {value!r}")
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
