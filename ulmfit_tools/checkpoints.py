"""Whole checkpoints: a checkpoint folder is there with all its files, or it is not there.

A checkpoint is written into a staging folder beside its place, every file and folder is synced to the disk, a manifest
with the size and the SHA-256 of each file is written last, and one rename puts the folder into its place. So a process
that is killed, a machine that loses power or a full disk leave at most a staging folder, whose name
(`.incomplete-checkpoint-120`) nothing takes for a checkpoint. A checkpoint is deleted in the same way: renamed first
(`.deleted-checkpoint-80`), then removed.

The functions here know files only; the `Trainer` that uses them is in `ulmfit_tools.trainer`.
"""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ulmfit_tools.best_weights import FOLDER as BEST_WEIGHTS
from ulmfit_tools.errors import InputError

MANIFEST = "manifest.json"
RECORD = "ulmfit_state.json"  # what `ULMFiTTrainer` adds to Trainer's files
STAGING = ".incomplete-"  # begins the name of what is being written
EARLIER_RUN = "_earlier-run-"  # begins the name of where another run's checkpoints are kept
_DELETED = ".deleted-"
_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
]
_NEEDED = ["optimizer.pt", "scheduler.pt", "trainer_state.json"]


class CheckpointError(InputError):
    """A checkpoint that cannot be read or written, told in one line."""


class NoGoodCheckpoint(CheckpointError):
    """There is no checkpoint to go on from: none was written, or all are damaged."""


def step_of(checkpoint: str | Path) -> int:
    """The optimizer step at which a checkpoint was written: 120 for `.../checkpoint-120`.

    Raises:
        CheckpointError: The folder has another name.
    """
    match = _NAME.fullmatch(Path(checkpoint).name)
    if match is None:
        raise CheckpointError(f'A checkpoint folder is named "checkpoint-STEP". Received: {checkpoint}')
    return int(match[1])


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoint folders of a run, the earliest step first, whether they are whole or not."""
    found = [path for path in Path(folder).glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


# Writing


def staging_folder(target: str | Path) -> Path:
    """Where the files of the folder `target` are written before it is whole: `.incomplete-NAME/NAME` beside it."""
    target = Path(target)
    return target.with_name(STAGING + target.name) / target.name


@contextmanager
def whole_folder(target: str | Path, *, expected_bytes: int = 0) -> Iterator[Path]:
    """Write a folder that appears with all its files or not at all.

    Yields the staging folder to write into. At the end of the `with` block everything is synced, listed in a manifest
    and renamed to `target`; what was there before is replaced. When the block raises, the staging folder is removed
    and whatever was at `target` stays as it was.

    Args:
        target: The folder to write.
        expected_bytes: About how large it will be, for the error line only.

    Raises:
        CheckpointError: The disk is full.
    """
    target, staging = Path(target), staging_folder(target)
    root = staging.parent
    shutil.rmtree(root, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        _seal(staging)
    except BaseException as error:
        written = _size(root)
        shutil.rmtree(root, ignore_errors=True)
        if _is_out_of_space(error):
            raise CheckpointError(_out_of_space(target, max(written, expected_bytes))) from error
        raise
    _put_in_place(staging, target)


def _seal(folder: Path) -> None:
    """Sync every file, then write the manifest: where there is a manifest, the files it lists were on the disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _sync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"version": 1, "files": files}, indent=1) + "\n", encoding="utf-8")
    _sync(manifest)
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder, folder.parent]:
        _sync(path)


def _put_in_place(staging: Path, target: Path) -> None:
    replaced = None
    if target.exists():  # the same step saved again, for example after a resume from an earlier one
        replaced = _set_aside(target)
    os.rename(staging, target)
    _sync(target.parent)
    shutil.rmtree(staging.parent, ignore_errors=True)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file that is there whole, or as it was before."""
    path = Path(path)
    aside = path.with_name(STAGING + path.name)
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _sync(aside)
    os.replace(aside, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Have the system write a file's content, or a folder's list of names, to the disk now."""
    if path.is_dir() and os.name == "nt":  # Windows has no handle of a folder to sync
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest, block = hashlib.sha256(), bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _is_out_of_space(error: BaseException | None) -> bool:
    """Whether writing failed for want of space; torch and safetensors tell it only in their text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        text = str(error)
        if "inline_container.cc" in text and "unexpected pos" in text:  # torch.save
            return True
        if "I/O error" in text and re.search(r"os error (28|122|27)\b", text):  # safetensors
            return True
        error = error.__cause__ or error.__context__
    return False


def _out_of_space(target: Path, needed: int) -> str:
    free = shutil.disk_usage(target.parent).free
    return (
        f"No space left to write {target}: it needs at least {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free"
        " there. Earlier checkpoints are untouched; free some space, or keep fewer (--save_total_limit), and resume."
    )


# Reading


def verify(folder: str | Path) -> list[str]:
    """Compare a folder with its manifest, to the last bit.

    Args:
        folder: What `whole_folder` wrote. Files that are not in the manifest are not looked at.

    Returns:
        One short text for each thing that is wrong; empty where the folder is whole.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return [f"{MANIFEST} is missing"]
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return [problem for name, facts in files.items() if (problem := _problem(folder / name, name, facts))]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} is damaged"]


def _problem(path: Path, name: str, facts: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != facts["size"]:
        return f"{name} has {size:,} of {facts['size']:,} bytes"
    if _sha256(path) != facts["sha256"]:
        return f"{name} has other content than was written"
    return None


def resume_problems(checkpoint: str | Path) -> list[str]:
    """What keeps a run from going on from a checkpoint exactly as if it had not stopped.

    A checkpoint with a manifest is compared with it. One without, as a plain `Trainer` writes it, is accepted when
    everything that a resume needs is there and can be opened: PyTorch's files are checked by their own checksums, the
    JSON files are parsed, and a `safetensors` file must have the length that its header says. A changed bit in the
    weights cannot be seen without a manifest.

    Args:
        checkpoint: The checkpoint folder.

    Returns:
        One short text for each problem; empty where the checkpoint is good.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return ["there is no such folder"]
    has_manifest = (checkpoint / MANIFEST).exists()
    if (has_manifest or (checkpoint / RECORD).exists()) and (problems := verify(checkpoint)):
        return problems
    problems = [f"{name} is missing" for name in _NEEDED if not (checkpoint / name).is_file()]
    if not any(checkpoint.glob("rng_state*.pth")):
        problems.append("rng_state.pth is missing")
    if not any((checkpoint / name).is_file() for name in _WEIGHTS):
        problems.append(f"the model's weights ({_WEIGHTS[0]}) are missing")
    if has_manifest:
        return problems
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    return problems + [f"{path.name} is damaged" for path in files if not _opens(path)]


def _opens(path: Path) -> bool:
    try:
        if path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"):
                return True
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            shards = content.get("weight_map", {}).values() if isinstance(content, dict) else []
            return all((path.parent / shard).is_file() for shard in shards)
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError):
        return False
    return True


def last_good_checkpoint(folder: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The latest checkpoint of a run from which it can go on exactly.

    Args:
        folder: The run's folder, with the `checkpoint-STEP` folders in it.

    Returns:
        The checkpoint, or None where there is no good one, and the later ones that were passed over, each with the
        reason.
    """
    skipped: list[tuple[Path, str]] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        problems = resume_problems(checkpoint)
        if not problems:
            return checkpoint, skipped
        skipped.append((checkpoint, "; ".join(problems)))
    return None, skipped


# Making room


def set_aside_run(folder: str | Path) -> Path | None:
    """Move the checkpoints of an earlier run out of a new one's way, into `_earlier-run-1`, `_earlier-run-2`, ...

    Left where they are, rotation would delete them, or keep them for the new run's, and a resume would take the latest
    step, whichever run it is of. A name that begins so is no part of what Trainer pushes to the Hub.

    Args:
        folder: The folder of both runs.

    Returns:
        Where they are now, in a folder from which the earlier run can be resumed; None where there were none.
    """
    folder = Path(folder)
    earlier = list_checkpoints(folder)
    if not earlier:
        return None
    taken = {path.name for path in folder.iterdir()}
    aside = folder / next(name for count in itertools.count(1) if (name := f"{EARLIER_RUN}{count}") not in taken)
    aside.mkdir()
    for path in [folder / BEST_WEIGHTS, *earlier]:  # the last one last: killed before, a resume finds it
        if path.exists():
            os.rename(path, aside / path.name)
    return aside


# Deleting


def delete_folder(folder: str | Path) -> None:
    """Delete a folder so that, killed at any moment, it is there with all its files or not at all."""
    shutil.rmtree(_set_aside(Path(folder)), ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    aside = folder.with_name(_DELETED + folder.name)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    return aside


def clean_up(folder: str | Path, names: str = "checkpoint-*") -> None:
    """Finish what a killed process left behind in a run's folder.

    A staging folder that is whole (the process was killed between writing and renaming it) becomes the checkpoint
    that it was to be, unless there is one; any other is removed, and so is a checkpoint that was being deleted.

    Args:
        folder: The run's folder.
        names: Which of the folders in it were written by `whole_folder` or deleted by `delete_folder`.
    """
    for leftover in Path(folder).glob(f"{STAGING}{names}"):
        name = leftover.name.removeprefix(STAGING)
        target, staging = leftover.with_name(name), leftover / name
        if staging.is_dir() and not target.exists() and not verify(staging):
            _put_in_place(staging, target)
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in Path(folder).glob(f"{_DELETED}{names}"):
        shutil.rmtree(leftover, ignore_errors=True)


def rotate_checkpoints(
    folder: str | Path, limit: int | None, *, newest: str | Path, best: str | Path | None = None
) -> list[Path]:
    """Delete the checkpoints beyond a number, the earliest steps first.

    The one that was just written is never deleted, so there is always a good one, nor is the best one, also where
    that keeps more than `limit`. Checkpoints of later steps than the one just written were left by a run that has
    gone back to an earlier step since (the later ones may be damaged); they go first.

    Args:
        folder: The run's folder.
        limit: How many to keep; None or 0 keeps all.
        newest: The checkpoint that was just written.
        best: The checkpoint of the best model.

    Returns:
        The folders that were deleted.
    """
    if limit is None or limit <= 0:
        return []
    existing = list_checkpoints(folder)
    kept = {Path(path).name for path in (newest, best) if path is not None} & {path.name for path in existing}
    excess = len(existing) - max(limit, len(kept))
    last = step_of(newest)
    candidates = sorted(existing, key=lambda path: (step_of(path) <= last, step_of(path)))
    deleted = [path for path in candidates if path.name not in kept][: max(0, excess)]
    for path in deleted:
        delete_folder(path)
    return deleted
