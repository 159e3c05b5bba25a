"""YAML in and out for plans and for the command line's `--config`."""

import re
from pathlib import Path
from typing import Any

import yaml

from ulmfit_tools.errors import InputError


class _StrictLoader(yaml.SafeLoader):
    """Reads `2e-4` as a number (YAML 1.1 takes it for text) and refuses a key that stands twice or is no plain value.

    Keys are looked at as they stand in the file: `<<` brings others in later, which the mapping's own replace.
    """

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            where = f"{self.name}, line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(
                    f"{where}: a key is a plain word, not a {key.id}. Put quotes around it to make it one"
                )
            if key.value in seen:
                raise InputError(f"{where}: the key {key.value!r} stands twice")
            seen.add(key.value)
        return node


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+\Z"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: The file is missing, is not UTF-8 or YAML, or holds something other than a mapping.
    """
    try:
        with path.open(encoding="utf-8") as file:
            values = yaml.load(file, Loader=_StrictLoader)  # a SafeLoader: plain values only
    except FileNotFoundError:
        raise InputError(f"There is no file {path}: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a mapping (key: value lines). Received: {type(values).__name__}")
    return values


def to_yaml(values: dict[str, Any]) -> str:
    """A mapping as YAML text that `read_yaml` reads back to the same values."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
