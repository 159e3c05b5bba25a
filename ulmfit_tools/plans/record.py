"""What a run folder remembers: the plan, settings, versions and data it was made with, and how far it came.

RUN_DIR/
  run.json                    what the run is: compared on resume, so a changed plan, dataset or model is refused
  results.json                metrics and times, written last: a run folder with it is complete
  phases/01-head/phase.json   "running" or "done", seconds, metrics
  phases/01-head/checkpoint-* while the phase runs
  phases/01-head/model/       its weights, until the next phase has its own
  config.json, model.safetensors, tokenizer.json ...: the result, an ordinary model folder
"""

import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ulmfit_tools.checkpoints import STAGING, clean_up, delete_folder, write_json
from ulmfit_tools.errors import InputError

_LIBRARIES = ("ulmfit_tools", "torch", "transformers", "datasets", "accelerate", "evaluate", "scikit-learn")

# Training arguments that say how a run is watched or where it runs, not what comes out of it.
_NEUTRAL = {
    "output_dir", "run_name", "report_to", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node",
    "logging_strategy", "logging_steps", "logging_first_step", "logging_dir", "save_total_limit", "save_strategy",
    "save_steps", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "dataloader_persistent_workers", "per_device_eval_batch_size", "eval_accumulation_steps", "project",
    "skip_memory_metrics", "include_num_input_tokens_seen", "ddp_timeout", "local_rank", "push_to_hub", "hub_token",
    "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision",
}  # fmt: skip


# What `run.json` holds beside the versions. Where a fingerprint is the same, how the path was spelt is of no account.
_PARTS = ("plan", "settings", "data", "model", "processes")
_SPELLINGS = {"data": "source", "model": "name"}
_SHOWN = 3  # so many differences are named, the causes first; another label column alone makes ten


@dataclass(frozen=True)
class RunFolder:
    """The paths and states inside one run folder.

    Args:
        path: The run folder (`output_dir`).
    """

    path: Path

    def phase_folder(self, index: int, name: str) -> Path:
        """The folder of the phase with this 0-based index."""
        return self.path / "phases" / f"{index + 1:02d}-{name}"

    def read(self, name: str, *keys: str) -> dict[str, Any] | None:
        """A JSON file of the folder, or None where it is not there.

        Args:
            name: The file.
            keys: What must be in it, since this tool puts it there.

        Raises:
            InputError: It cannot be read, or lacks a key.
        """
        file = self.path / name
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{file} cannot be read ({error}): the run folder was changed from outside. Put the file back, or "
                "move it elsewhere"
            ) from None
        if keys and not (isinstance(content, dict) and set(keys) <= set(content)):
            raise InputError(
                f"{file} is not what this tool writes under that name: choose another --output_dir, or move the file "
                "elsewhere"
            )
        return content

    def record(self) -> dict[str, Any] | None:
        """`run.json`, or None where there is none."""
        return self.read("run.json", *_PARTS)

    def phase_state(self, index: int, name: str) -> dict[str, Any]:
        """What `phase.json` says, `{"status": "new", ...}` where there is none."""
        file = self.phase_folder(index, name).relative_to(self.path) / "phase.json"
        return self.read(str(file), "status", "seconds") or {"status": "new", "seconds": 0.0}

    def write_phase_state(self, index: int, name: str, state: dict[str, Any]) -> None:
        """Replace `phase.json` in one step: it is there whole, or the old one is."""
        folder = self.phase_folder(index, name)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "phase.json", state)


def describe_run(plan: dict, settings: dict, data: dict, model: dict, processes: int) -> dict[str, Any]:
    """What goes into `run.json`; `check_same_run` compares all of it but the versions."""
    kept = {key: value for key, value in settings.items() if key not in _NEUTRAL}
    versions = {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()}
    record = {"plan": plan, "settings": kept, "data": data, "model": model, "processes": processes}
    return json.loads(json.dumps(record | {"versions": versions}, default=str))


def check_folder(folder: RunFolder, *, resume: bool, overwrite: bool) -> None:
    """Decide whether a run may start or go on in this folder, whatever it is of; the folder stays as it is.

    Raises:
        InputError: The folder cannot be written to; or it holds a run, or other files, and neither `resume` nor
            `overwrite` was given; or both were.
    """
    if resume and overwrite:
        raise InputError("--resume goes on with the run in a folder and --overwrite deletes it: give one of them")
    if not (folder.path / "run.json").is_file():
        _check_place(folder.path)
    old = folder.record()
    if overwrite:
        return
    if old is None:
        # A run that is killed while it writes its first file leaves that, unfinished, and nothing else.
        if folder.path.is_dir() and any(not file.name.startswith(STAGING) for file in folder.path.iterdir()):
            raise InputError(
                f"{folder.path} is not empty and holds no run of this tool: choose another --output_dir, "
                "or add --overwrite to write into it"
            )
    elif not resume:
        raise InputError(
            f"{folder.path} holds a run already (plan '{old['plan']['name']}'): add --resume to go on with it, "
            "--overwrite to delete it, or choose another --output_dir"
        )


def _check_place(path: Path) -> None:
    """Refuse a run folder that is a file or cannot be made; it is tried, since permissions do not tell all."""
    there = next(place for place in (path, *path.parents) if os.path.exists(place))
    if not there.is_dir():
        raise InputError(
            f"--output_dir is the folder for the run, and {there} is a file: name another. Received: {path}"
        )
    try:
        TemporaryDirectory(prefix=STAGING, dir=there).cleanup()
    except OSError as error:
        raise InputError(
            f"--output_dir cannot be written to ({there}: {error.strerror}): name another folder. Received: {path}"
        ) from None


def check_same_run(folder: RunFolder, description: dict[str, Any]) -> None:
    """Decide whether the run in a folder may go on as the run of this description; where there is none, it may begin.

    Raises:
        InputError: The plan, settings, dataset, model or number of processes differ.
    """
    old = folder.record()
    if old is None:
        return
    then, now = ({part: values[part] for part in _PARTS} for values in (old, description))
    for part, spelling in _SPELLINGS.items():
        same = then[part].get("fingerprint") == now[part]["fingerprint"]
        # What an earlier version of this tool did not yet record of the data or the model is not compared.
        now[part] = {key: value for key, value in now[part].items() if key in then[part]}
        if same:
            now[part][spelling] = then[part].get(spelling)
    changes = differences(then, now)
    if changes:
        more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        raise InputError(
            f"{folder.path} cannot be resumed, since it was made otherwise: {'; '.join(changes[:_SHOWN])}{more}. Give "
            "what that run was given, or --overwrite to start anew, or another --output_dir"
        )


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The leaves in which two JSON values differ, each as `path: old -> new`, in the order of the new one."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*new, *old])
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and any(map(_is_tree, old)):
        return [
            line for i, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{where}[{i}]")
        ]
    return [] if old == new else [f"{where}: {_short(old)} -> {_short(new)}"]


def _is_tree(value: Any) -> bool:
    return isinstance(value, (dict, list))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def start_folder(folder: RunFolder, description: dict[str, Any], *, overwrite: bool) -> None:
    """Write `run.json`, after clearing what an earlier run left where `overwrite` says so; other files stay.

    Its record goes last: stopped before, the folder still holds that run, which has not begun.
    """
    if folder.record() is not None:
        clean_up(folder.path, "phases")  # an earlier call may have been killed while it deleted them
    if overwrite:
        (folder.path / "results.json").unlink(missing_ok=True)  # whosever it is, it would stand for this run's
        if folder.record() is None:  # moved away, since it was damaged: what its run has done must not stand for this
            for state in (folder.path / "phases").glob("*/phase.json"):
                delete_folder(state.parent)
    if overwrite and folder.record() is not None:
        for pattern in ("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json"):
            for file in folder.path.glob(pattern):
                file.unlink()
        if (folder.path / "phases").is_dir():
            delete_folder(folder.path / "phases")
        (folder.path / "run.json").unlink()
    os.makedirs(folder.path, exist_ok=True)
    if folder.record() is None:
        write_json(folder.path / "run.json", description)
