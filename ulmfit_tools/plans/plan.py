"""A plan: a named list of phases, in Python or in a YAML file."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ulmfit_tools.errors import InputError, nearest
from ulmfit_tools.plans.files import read_yaml, to_yaml
from ulmfit_tools.plans.phase import Phase, check_keys

_SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True, kw_only=True)
class FineTuningPlan:
    """A named list of phases that run in order, each from the weights of the one before.

    Args:
        name: What the plan is called.
        phases: The phases; at least one.
        description: One or two sentences for people.
        settings: Training arguments that this plan sets where the user sets none, such as `learning_rate`.

    Raises:
        InputError: There is no phase, two phases share a name, or a value is not of the kind named above.
    """

    name: str
    phases: Sequence[Phase]
    description: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        """Check the list of phases."""
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"A plan's name is a text. Received: {self.name!r}")
        if not isinstance(self.settings, dict):
            raise InputError(f"A plan's settings are a mapping of training arguments. Received: {self.settings!r}")
        if not isinstance(self.phases, Sequence) or not all(isinstance(phase, Phase) for phase in self.phases):
            raise InputError(f"Plan '{self.name}': phases are a list of Phase objects. Received: {self.phases!r}")
        object.__setattr__(self, "phases", tuple(self.phases))
        if not self.phases:
            raise InputError(f"Plan '{self.name}' has no phases, so nothing would train: give it at least one")
        twice = [name for name, count in Counter(phase.name for phase in self.phases).items() if count > 1]
        if twice:
            raise InputError(f"Plan '{self.name}': phase names must differ. Received twice: {', '.join(twice)}")

        if self.phases[0].learning_rate == "previous":
            raise InputError(f"Plan '{self.name}': the first phase has no phase before it, so no 'previous' rate")

    def expand(self, group_names: Sequence[str]) -> list[Phase]:
        """The phases for a model whose layer groups have these names; a phase over `each` becomes several."""
        phases = [one for phase in self.phases for one in phase.expand(group_names)]
        for phase in phases:
            phase.groups_to_train(group_names)  # names what the model does not have before anything is trained
        return phases

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a plan file."""
        values: dict[str, Any] = {"name": self.name}
        if self.description:
            values["description"] = self.description
        if self.settings:
            values["settings"] = dict(self.settings)
        return values | {"phases": [phase.to_dict() for phase in self.phases]}

    def to_yaml(self) -> str:
        """The plan as the text of a plan file."""
        return to_yaml(self.to_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FineTuningPlan":
        """A plan from a mapping as in a plan file.

        Raises:
            InputError: A key is unknown (the nearest is suggested) or a value is wrong.
        """
        check_keys(values, ["name", "description", "settings", "phases"], what="A plan")
        for key in ("name", "phases"):
            if key not in values:
                raise InputError(f"A plan needs the key '{key}'. Received: {', '.join(values) or 'nothing'}")
        if not isinstance(values["phases"], (list, tuple)):
            raise InputError(f"A plan's phases are a list. Received: {values['phases']!r}")
        return cls(
            name=values["name"] and str(values["name"]),  # a name of digits is one too
            description=" ".join(str(values.get("description") or "").split()),
            settings={} if values.get("settings") is None else values["settings"],
            phases=[Phase.from_dict(phase) for phase in values["phases"]],
        )

    @classmethod
    def load(cls, name_or_path: str | Path) -> "FineTuningPlan":
        """A shipped plan by name, or one from a YAML file.

        Raises:
            InputError: There is no such plan or file, or the file's content is wrong.
        """
        text = str(name_or_path)
        if text in shipped_plans():
            return cls.from_dict(read_yaml(_SHIPPED / f"{text}.yaml"))
        path = Path(text)
        if path.suffix in (".yaml", ".yml") or path.is_file():
            return cls.from_dict(read_yaml(path))
        names = ", ".join(shipped_plans())
        suggestion = nearest(text, shipped_plans())
        raise InputError(f"There is no plan '{text}': give one of {names} or the path of a YAML file.{suggestion}")


def shipped_plans() -> list[str]:
    """The names of the plans that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))
