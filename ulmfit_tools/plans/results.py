"""What a phase and a run came to."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PhaseResult:
    """What one phase came to.

    Args:
        name: The phase's name.
        trains: Names of the layer groups that trained, input to output.
        learning_rate: The rate of the last group at the schedule's peak, or `(low, high)`.
        epochs: Epochs trained.
        steps: Optimizer steps trained.
        seconds: Wall time, summed over interruptions.
        metrics: Validation metrics of the weights that the phase handed on, without the `eval_` prefix.
        precomputed: What was precomputed (`feature_cache.CacheReport`); None where the phase ran through all layers.
    """

    name: str
    trains: tuple[str, ...]
    learning_rate: Any
    epochs: float
    steps: int
    seconds: float
    metrics: dict[str, float]
    precomputed: dict[str, Any] | None = None


@dataclass(frozen=True)
class PlanResult:
    """What a run came to.

    Args:
        output_dir: The run folder: an ordinary model folder too.
        plan: The plan's name.
        phases: One result for each phase, in order.
        metrics: For each evaluated split (`validation`, `test`) its metrics.
        seconds: Wall time of all phases.
    """

    output_dir: Path
    plan: str
    phases: list[PhaseResult]
    metrics: dict[str, dict[str, float]]
    seconds: float

    @classmethod
    def from_dict(cls, output_dir: Path, values: dict[str, Any]) -> "PlanResult":
        """The result that `results.json` in a run folder holds."""
        phases = [PhaseResult(**phase | {"trains": tuple(phase["trains"])}) for phase in values["phases"]]
        return cls(output_dir, values["plan"], phases, values["metrics"], values["seconds"])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `results.json`."""
        return {
            "plan": self.plan,
            "seconds": self.seconds,
            "metrics": self.metrics,
            "phases": [dataclasses.asdict(phase) for phase in self.phases],
        }


def clean_metrics(metrics: Mapping[str, Any], prefix: str = "eval_") -> dict[str, float]:
    """The scores among a trainer's metrics, without prefix, times and counts."""
    timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    return {key: value for key, value in named.items() if not key.endswith(timing)}
