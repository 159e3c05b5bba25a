"""The flags of the command line, which of them were given, and what else a command needs to know before it works."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ulmfit_tools.errors import InputError, nearest

PROGRAM = "ulmfit-tools"
_NOT_GIVEN = object()  # a default that no flag can have: which flags were given decides what a plan may set


def _help(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


_CONFIG = "YAML file with any of these flags; the command line wins over it."
_VALIDATION_SPLIT = (
    "Share of the training rows to validate on where no split is given: a tenth unless told, and 0 for none."
)


@dataclass
class ModelFlags:
    """Which model."""

    model: str | None = _help("minilm (embedded), a Hub name, a model folder or a run folder.")
    trust_remote_code: bool = _help("Let a Hub model run code of its own.", False)


@dataclass
class DataFlags:
    """Which texts and labels."""

    dataset: str | None = _help(
        "stdlib-docs (embedded), a Hub name, a .csv .tsv .json .jsonl .parquet .txt file, a folder of splits, or a "
        "save_to_disk folder."
    )
    text_column: str | None = _help("Column of the text, or two for text pairs: premise,hypothesis. Guessed if clear.")
    label_column: str | None = _help("Column of the label. Guessed if clear; evaluate takes the run's.")
    max_length: int | None = _help("Cut texts to this many tokens. Default: what the model takes.")


@dataclass
class TrainFlags:
    """What `train` has beside training arguments."""

    plan: str = _help(
        "A shipped plan (baseline, chain_thaw, fastai_eight_steps, gradual_unfreezing) or a YAML file.",
        "gradual_unfreezing",
    )
    validation_split: float | None = _help(_VALIDATION_SPLIT)
    resume: bool = _help("Go on with the run in --output_dir, or start it where there is none.", False)
    overwrite: bool = _help("Delete the run in --output_dir and start anew.", False)
    config: str | None = _help(_CONFIG)


@dataclass
class RangeFlags:
    """What `lr-find` has beside training arguments."""

    start_lr: float = _help("The first rate of the sweep (the head's).", 1e-7)
    end_lr: float = _help("The last rate of the sweep; it stops before where the loss diverges.", 10.0)
    num_steps: int = _help("Optimizer steps of the sweep.", 100)
    mode: str = _help("exponential or linear.", "exponential")
    num_sweeps: int = _help("Sweeps, each from the same start on other batches; the suggestions are their means.", 1)
    confirm: bool = _help("Also train short probes around the suggestion, and take the best.", False)
    eval_batches: int = _help(
        "Take the loss on this many batches of the validation split, not on the training batches.", 0
    )
    validation_split: float | None = _help(_VALIDATION_SPLIT)
    plot: str | None = _help("Draw the curve into this picture file: .png, .pdf, .svg or what else matplotlib writes.")
    json: str | None = _help("Write the curve into this JSON file.")
    config: str | None = _help(_CONFIG)


@dataclass
class GroupFlags:
    """The rates that `groups` shows."""

    learning_rate: float = _help("Rate of the last group. By default that of the default plan.", 4e-4)
    learning_rate_low: float | None = _help("Rate of the first group: geometric spacing in between.")
    discriminative_factor: float | None = _help("Each group's rate is the next one's divided by this.")
    num_layer_groups: int | None = _help("Merge the groups into this many.")


@dataclass
class EvaluateFlags:
    """What `evaluate` has."""

    split: str | None = _help("Which split; by default test, else validation, else the only one.")
    batch_size: int = _help("Texts at a time.", 64)
    json: str | None = _help("Also write the metrics to this JSON file.")


@dataclass
class CacheFlags:
    """What `cache` has."""

    folder: str | None = _help("The cache. Default: where plans keep it ($ULMFIT_TOOLS_CACHE, else the user's cache).")
    remove: bool = _help("Delete the activations in it.", False)


@dataclass
class PredictFlags:
    """What `predict` has."""

    text: list[str] | None = _help("One or more texts.")
    file: str | None = _help("A file of texts: .txt (a text a line) .csv .tsv .json .jsonl .parquet.")
    text_column: str | None = _help("Column of the text in the file, or two for text pairs. Default: the run's.")
    output: str | None = _help("Write a CSV file with text, label and score instead of a table.")
    batch_size: int = _help("Texts at a time.", 64)
    max_length: int | None = _help("Cut texts to this many tokens. Default: what the model takes.")


def parse(command: str, flag_classes: Sequence[type], argv: Sequence[str], description: str) -> dict[str, Any]:
    """The flags that were given, and only those, as name -> value."""
    from transformers import HfArgumentParser

    names = [f"--{f.name}" for flag_class in flag_classes for f in dataclasses.fields(flag_class)]

    class Parser(HfArgumentParser):  # one that raises where argparse prints its usage
        def error(self, message: str):
            _, _, unknown = message.partition("unrecognized arguments: ")
            suggestion = nearest(unknown.split()[0].split("=")[0], names) if unknown else ""
            raise InputError(f"{command}: {message}.{suggestion} '{PROGRAM} {command} --help' lists the flags")

    parser = Parser(
        tuple(flag_classes),  # type: ignore[arg-type]
        prog=f"{PROGRAM} {command}",
        description=description,
        allow_abbrev=False,
        usage="%(prog)s [flags]",
    )
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        raise SystemExit(0)
    for flag_class in flag_classes:
        parser.set_defaults(**{f.name: _NOT_GIVEN for f in dataclasses.fields(flag_class) if f.init})
    return {key: value for key, value in vars(parser.parse_args(list(argv))).items() if value is not _NOT_GIVEN}


def config_flags(argv: Sequence[str]) -> list[str]:
    """The content of the `--config` file as flags."""
    from ulmfit_tools.plans.files import read_yaml

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", nargs="?")  # that it lacks its file is said by `parse`, in one line
    path = finder.parse_known_args(list(argv))[0].config
    if path is None:
        return []
    values = read_yaml(Path(path))
    if "phases" in values:
        raise InputError(f"{path} is a plan, which has phases, and no file of flags: give it by --plan {path}")
    return as_flags(values)


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """A mapping as command-line flags; what is None is left out."""
    flags: list[str] = []
    for key, value in values.items():
        if value is None:
            continue
        listed = (
            value if isinstance(value, list) else [json.dumps(value) if isinstance(value, (dict, bool)) else value]
        )
        flags += [f"--{key}", *map(str, listed)]
    return flags


def defaults(flag_class: type, given: Mapping[str, Any]) -> Any:
    """An instance of the flag class from what was given; the rest keeps its defaults."""
    names = {f.name for f in dataclasses.fields(flag_class)}
    return flag_class(**{key: value for key, value in given.items() if key in names})


def need(command: str, flags: Any, *names: str) -> None:
    """Refuse a command that lacks a flag."""
    for name in names:
        if getattr(flags, name) is None:
            raise InputError(f"{command} needs --{name}. {type(flags).__dataclass_fields__[name].metadata['help']}")
