"""`transformers.TrainingArguments` with this package's settings, and with defaults for fine-tuning classifiers."""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from ulmfit_tools.errors import InputError, nearest
from ulmfit_tools.schedules import SCHEDULES, check_schedule

_UPSTREAM = {upstream.name: upstream for upstream in fields(TrainingArguments)}


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
        InputError: Settings that contradict each other or that would be ignored, or an unknown schedule.
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
        """`lr_scheduler_kwargs`, parsed; empty where none were given."""
        assert not isinstance(self.lr_scheduler_kwargs, str)
        return self.lr_scheduler_kwargs or {}

    def to_dict(self) -> dict[str, Any]:
        """As upstream's, with the schedule's name as a plain string, which YAML can write too."""
        return super().to_dict() | {"lr_scheduler_type": self.schedule_name}

    def __post_init__(self) -> None:
        self._check_rates()
        if self.enable_jit_checkpoint:
            raise InputError(
                "enable_jit_checkpoint is not needed here: on SIGTERM the run writes a checkpoint after the step and"
                " stops. Leave it out. Received: enable_jit_checkpoint=True"
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
        if isinstance(self.lr_scheduler_kwargs, str):  # upstream leaves it as it is where it is no JSON object
            raise InputError(
                "lr_scheduler_kwargs are the schedule's settings as a JSON object, as '{\"cycle_len\": 1}'. Received: "
                f"{self.lr_scheduler_kwargs!r}"
            )
        if name in SCHEDULES:
            self.lr_scheduler_type = ScheduleName(name)
            self._check_schedule()

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
