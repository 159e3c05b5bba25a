"""`transformers.TrainingArguments` with this package's settings, and with defaults for fine-tuning classifiers."""

import inspect
import math
from dataclasses import dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from typing import Any, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from ulmfit_tools.errors import InputError, nearest
from ulmfit_tools.schedules import SCHEDULES, check_schedule

_UPSTREAM = {upstream.name: upstream for upstream in fields(TrainingArguments)}

# The types of settings that are checked, in words. What upstream takes in several forms, or turns into something else,
# is left to upstream.
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list[float]: "a list of numbers",
    list[str]: "a list of texts",
}

# What `get_scheduler` itself gives to Trainer's schedules; the other parameters are their settings.
_GIVEN_TO_SCHEDULE = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs"}

# The least that an argument may be, where transformers finds out late or never.
_LEAST = {
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
}
_POSITIVE = ("num_train_epochs", "learning_rate", "per_device_train_batch_size", "per_device_eval_batch_size")


class ScheduleName(str):
    """The name of one of this package's schedules, with the `.value` that Trainer's model card reads of its own."""

    @property
    def value(self) -> str:
        """The name as a plain string."""
        return str(self)


def _with_default(name: str, value: Any) -> Any:
    """The field of `TrainingArguments` with another default, so that its help and choices stay upstream's."""
    return field(default=value, metadata=dict(_UPSTREAM[name].metadata))


@dataclass
class ULMFiTTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with this package's few settings, and defaults for fine-tuning classifiers.

    `lr_scheduler_type` takes the names in `ulmfit_tools.schedules.SCHEDULES` beside Trainer's own, and
    `lr_scheduler_kwargs` their settings. `learning_rate` is the rate of the last layer group, the head.

    Defaults other than Trainer's, and why:

    - `lr_scheduler_type="slanted_triangular"`: a short warm-up and a long decay, made for fine-tuning.
    - `train_sampling_strategy="group_by_length"`: about half the time of an epoch where text lengths vary.
    - `per_device_train_batch_size=32`, `per_device_eval_batch_size=64`: texts for classification are short; 8 leaves
      any device idle, and evaluation keeps no activations.
    - `logging_steps=50`: most classifiers are trained in a few hundred steps; 500 shows one number or none.
    - `save_total_limit=2`: a checkpoint is three times the model's size; the last two are enough to go on from should
      one of them be damaged. The best one is kept beside them. 0 keeps all.
    - `restore_callback_states_from_checkpoint=True`: else early stopping counts its patience anew after a resume.

    Args:
        discriminative_factor: Each layer group's rate is the next one's divided by it; at least 1. None spreads the
            rates by the same total whatever the number of groups; see `group_learning_rates`.
        num_layer_groups: Merge the model's layer groups into so many; None for one a block.
        learning_rate_low: The rate of the first group; the others are spaced geometrically up to `learning_rate`.
        group_learning_rates: The rate of each group, from input to output.

    Raises:
        InputError: Settings that contradict each other or that would be ignored, a value of a wrong type, an unknown
            schedule or a setting that it does not take.
    """

    discriminative_factor: float | None = field(
        default=None,
        metadata={"help": "Each layer group's rate is the next one's divided by this; 1 trains all alike."},
    )
    num_layer_groups: int | None = field(
        default=None, metadata={"help": "Merge the layer groups into so many. The default is one a block."}
    )
    learning_rate_low: float | None = field(
        default=None,
        metadata={"help": "Rate of the first layer group; the others are spaced geometrically up to learning_rate."},
    )
    group_learning_rates: list[float] | None = field(
        default=None, metadata={"help": "The rate of each layer group, from input to output."}
    )

    lr_scheduler_type: str = field(
        default="slanted_triangular",
        metadata={"help": f"The schedule: {', '.join(SCHEDULES)}, or one of Trainer's own."},
    )
    train_sampling_strategy: str = _with_default("train_sampling_strategy", "group_by_length")
    per_device_train_batch_size: int = _with_default("per_device_train_batch_size", 32)
    per_device_eval_batch_size: int = _with_default("per_device_eval_batch_size", 64)
    logging_steps: float = _with_default("logging_steps", 50)
    save_total_limit: int | None = _with_default("save_total_limit", 2)
    restore_callback_states_from_checkpoint: bool = _with_default("restore_callback_states_from_checkpoint", True)

    @property
    def schedule_name(self) -> str:
        """`lr_scheduler_type` as a plain string, also for Trainer's own schedules."""
        return getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)

    @property
    def schedule_settings(self) -> dict[str, Any]:
        """`lr_scheduler_kwargs`, parsed; empty where none were given. A null leaves a setting at its default."""
        assert not isinstance(self.lr_scheduler_kwargs, str)
        return {key: value for key, value in (self.lr_scheduler_kwargs or {}).items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """As upstream's, with the schedule's name as a plain string, which YAML can write too."""
        return super().to_dict() | {"lr_scheduler_type": self.schedule_name}

    def __post_init__(self) -> None:
        self._check_types()
        self._check_rates()
        if self.enable_jit_checkpoint:
            raise InputError(
                "enable_jit_checkpoint is not needed here: on SIGTERM the run writes a checkpoint after the step and"
                " stops. Leave it out. Received: enable_jit_checkpoint=True"
            )
        if self.dataloader_persistent_workers:
            raise InputError(
                "dataloader_persistent_workers has no place here: workers that stay draw other random numbers than "
                "those of a resumed run. Leave it out. Received: dataloader_persistent_workers=True"
            )
        if not 0 <= self.label_smoothing_factor < 1:
            raise InputError(
                "label_smoothing_factor is the share of each label that is spread over all classes, from 0 to below 1."
                f" Received: label_smoothing_factor={self.label_smoothing_factor}"
            )
        name = self.schedule_name
        allowed = [*SCHEDULES, *(known.value for known in SchedulerType)]
        if name not in allowed:
            raise InputError(
                f"lr_scheduler_type is one of {', '.join(allowed)}.{nearest(name, allowed)}"
                f" Received: lr_scheduler_type={name!r}"
            )
        if name in SCHEDULES:
            self.lr_scheduler_type = SchedulerType.LINEAR  # upstream turns the name into its own enumeration
        super().__post_init__()
        if not isinstance(self.lr_scheduler_kwargs, dict | None):  # upstream leaves a text that is no JSON object
            raise InputError(
                "lr_scheduler_kwargs are the schedule's settings: a mapping, or a JSON object as '{\"cycle_len\": 1}'."
                f" Received: {self.lr_scheduler_kwargs!r}"
            )
        if name in SCHEDULES:
            self.lr_scheduler_type = ScheduleName(name)
            self._check_schedule()
        elif self.learning_rate > 0:
            self._check_schedule_of_trainer()

    def _check_types(self) -> None:
        for name, (kind, optional) in _checked_types().items():
            _check_type(name, getattr(self, name), kind, optional)
        for setting in fields(self):
            value, choices = getattr(self, setting.name, None), setting.metadata.get("choices")
            if choices and value != setting.default and value not in list(choices):
                raise InputError(
                    f"{setting.name} is one of {', '.join(choices)}.{nearest(str(value), choices)} Received: "
                    f"{setting.name}={value!r}"
                )

    def _check_rates(self) -> None:
        given = ["group_learning_rates", "learning_rate_low", "discriminative_factor"]
        given = [name for name in given if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"{given[0]} says the rate of every layer group; leave out {' and '.join(given[1:])}.")
        if self.group_learning_rates is not None:
            if not self.group_learning_rates:
                raise InputError("group_learning_rates has a rate for each layer group. Received: []")
            default, last = _UPSTREAM["learning_rate"].default, self.group_learning_rates[-1]
            if self.learning_rate not in (default, last):
                raise InputError(
                    f"learning_rate is the last of group_learning_rates; leave it out. Received: learning_rate="
                    f"{self.learning_rate}, group_learning_rates={self.group_learning_rates}"
                )
            self.learning_rate = last

    def _check_schedule(self) -> None:
        if self.warmup_steps:
            raise InputError(
                f"The schedule {self.lr_scheduler_type} has its own rise and ignores warmup_steps; leave it out or"
                f" choose one of Trainer's own schedules. Received: warmup_steps={self.warmup_steps}"
            )
        check_schedule(self.lr_scheduler_type, self.schedule_settings)

    def _check_schedule_of_trainer(self) -> None:
        """Go through the schedule once on a stand-in: Trainer makes it when the training begins."""
        name, settings = self.schedule_name, self.schedule_settings
        make: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
        taken = inspect.signature(make).parameters
        allowed = sorted(set(taken) - _GIVEN_TO_SCHEDULE)
        for key, value in settings.items():
            if key not in allowed and "kwargs" not in taken:
                raise InputError(
                    f'The schedule "{name}" has no setting "{key}"; it has {", ".join(allowed) or "none"}.'
                    f"{nearest(key, allowed)} Received: {key}={value!r}"
                )
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=self.learning_rate)
        steps = 20
        try:
            schedule = get_scheduler(
                name,
                optimizer,
                num_warmup_steps=self.get_warmup_steps(steps),
                num_training_steps=steps,
                scheduler_specific_kwargs=settings,
            )
            optimizer.step()
            for _ in range(steps if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR) else 0):
                schedule.step()  # the others need a metric
        except (TypeError, ValueError, ArithmeticError) as error:
            raise InputError(
                f'The schedule "{name}" cannot be made: {" ".join(str(error).split())}. Received: '
                f"lr_scheduler_kwargs={settings}"
            ) from None


@cache
def _checked_types() -> dict[str, tuple[Any, bool]]:
    """The settings whose type is one of `_WORDS`, each with that type and whether None is allowed too."""
    hints = get_type_hints(ULMFiTTrainingArguments)
    found = {}
    for setting in fields(ULMFiTTrainingArguments):
        hint = hints[setting.name]
        kinds = [hint] if get_origin(hint) is list or not get_args(hint) else list(get_args(hint))
        plain = [kind for kind in kinds if kind is not type(None)]
        if setting.init and len(plain) == 1 and plain[0] in _WORDS:
            found[setting.name] = (plain[0], len(kinds) > 1)
    return found


def _check_type(name: str, value: Any, kind: Any, optional: bool) -> None:
    if value is None and optional:
        return
    if get_origin(kind) is list:
        fits = isinstance(value, (list, tuple)) and all(_is_a(one, get_args(kind)[0]) for one in value)
    else:
        fits = _is_a(value, kind)
    if not fits:
        raise InputError(f"{name} must be {_WORDS[kind]}. Received: {name}={value!r}")


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind in (bool, str):
        return kind in (bool, str) and isinstance(value, kind)
    return isinstance(value, Integral) if kind is int else isinstance(value, Real) and not math.isnan(value)


def check_values(args: ULMFiTTrainingArguments) -> None:
    """Check what a command or a plan needs of the arguments' values, and transformers finds out late or never.

    Raises:
        InputError: A value is too low.
    """
    for key, least in _LEAST.items():
        if getattr(args, key) < least:
            raise InputError(f"--{key} is at least {least}. Received: {getattr(args, key)}")
    for key in _POSITIVE:
        if not getattr(args, key) > 0:
            raise InputError(f"--{key} must be positive. Received: {getattr(args, key)}")
