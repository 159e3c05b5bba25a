"""Activations on disk: ragged, memory-mapped, built in parts that survive a crash, found by what they were made from.

CACHE_DIR/
  4f6c.../entry.json         what the entry holds; written once the files have their sizes
  4f6c.../activations.bin    the vectors of all rows, one row after another, no padding
  4f6c.../positions.bin      for entries of one vector a row: which position of the row it is
  4f6c.../done.bin           a byte for each part: 1 once its vectors are on the disk
  4f6c.../complete.json      written last, with a checksum of the files; an entry without it is never read
  4f6c.lock                  held by the process that builds or removes it, or by those that read it
"""

import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from ulmfit_tools.checkpoints import STAGING, write_json
from ulmfit_tools.errors import InputError
from ulmfit_tools.freeze_boundary import CannotPrecompute

logger = logging.getLogger(__name__)

ROWS_IN_A_PART = 256
_FILES = {"entry.json", "activations.bin", "positions.bin", "done.bin", "complete.json"}
SPARE_ROOM = 1.05  # of the disk room that an entry needs

# NumPy has no bfloat16: its bits are kept as whole numbers.
_NUMPY_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.int16}
DTYPES = tuple(_NUMPY_TYPES)


@dataclass(frozen=True, eq=False)
class Entry:
    """The activations of one dataset at one boundary.

    Args:
        folder: Where it lies.
        lengths: How many vectors each row has, shape (rows,).
        width: The length of a vector.
        dtype: "float32", "float16" or "bfloat16".
        has_positions: Whether a row's single vector comes with its position in the row.
    """

    folder: Path
    lengths: np.ndarray
    width: int
    dtype: str = "float32"
    has_positions: bool = False

    @cached_property
    def starts(self) -> np.ndarray:
        """The number of vectors before each row, and of all at the end; shape (rows + 1,), int64."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    @property
    def nbytes(self) -> int:
        """Its size on disk."""
        vector = self.width * np.dtype(_NUMPY_TYPES[self.dtype]).itemsize
        return int(self.starts[-1]) * vector + 4 * len(self.lengths) * self.has_positions

    @property
    def nbytes_to_come(self) -> int:
        """What the disk needs for it beside what an earlier build holds there: files have no blocks where no part is.

        Whether that build is gone on with or goes, its room is this one's.
        """
        return max(0, self.nbytes - sum(512 * file.stat().st_blocks for file in self.folder.glob("*ions.bin")))

    @property
    def parts(self) -> int:
        """In how many parts it is built."""
        return -(-len(self.lengths) // ROWS_IN_A_PART)

    @property
    def description(self) -> dict[str, Any]:
        """What `entry.json` says."""
        lengths = hashlib.sha256(np.ascontiguousarray(self.lengths, dtype=np.int64).tobytes()).hexdigest()
        return {"rows": len(self.lengths), "lengths": lengths, "width": self.width, "dtype": self.dtype}

    @property
    def _sizes(self) -> dict[str, int]:
        positions = {"positions.bin": 4 * len(self.lengths)} if self.has_positions else {}
        return {"activations.bin": self.nbytes - sum(positions.values()), **positions, "done.bin": self.parts}

    @property
    def is_complete(self) -> bool:
        """Whether it was built to the end and its files have their sizes."""
        return self._fits("complete.json")

    def is_sound(self) -> bool:
        """Whether it is complete and its files hold the bytes that were written.

        Reads them from end to end, which takes a small share of the time of computing them.
        """
        try:
            return self.is_complete and self._told("complete.json").get("checksum") == self._checksum()
        except OSError:
            return False

    def missing_parts(self) -> list[int]:
        """The parts that are still to be built."""
        done = np.frombuffer((self.folder / "done.bin").read_bytes(), dtype=np.uint8)
        return np.flatnonzero(done == 0).tolist()

    def written(self, order: np.ndarray) -> np.ndarray:
        """Of the rows in the order in which they are computed, those that are on the disk."""
        if not self._fits("entry.json"):
            return order[:0]
        return order[~np.isin(np.arange(len(order)) // ROWS_IN_A_PART, self.missing_parts())]

    def _told(self, marker: str) -> dict[str, Any]:
        try:
            told = json.loads((self.folder / marker).read_text())
        except (OSError, ValueError):
            return {}
        return told if isinstance(told, dict) else {}

    def _fits(self, marker: str) -> bool:
        """Whether a marker describes this entry, and all files have their sizes."""
        told = self._told(marker)
        try:
            sizes = {name: (self.folder / name).stat().st_size for name in self._sizes}
        except OSError:
            return False
        return sizes == self._sizes and {name: told.get(name) for name in self.description} == self.description

    def _checksum(self) -> int:
        checksum = 0
        for name in self._sizes:
            with open(self.folder / name, "rb") as file:
                while chunk := file.read(2**20):
                    checksum = zlib.crc32(chunk, checksum)
        return checksum

    # Writing

    def prepare(self, *, keep: bool = True) -> None:
        """Make the files in their full size.

        Args:
            keep: Go on with what an interrupted build of the same entry left. What was built to the end goes: whoever
                builds it again has found it wrong.
        """
        if keep and self._fits("entry.json") and not (self.folder / "complete.json").exists():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for name, size in self._sizes.items():
            with open(self.folder / name, "wb") as file:
                file.truncate(size)
        write_json(self.folder / "entry.json", self.description)

    def write(self, part: int, rows: np.ndarray, vectors: Sequence[torch.Tensor], positions: Sequence[int]) -> None:
        """Put the vectors of a part's rows, each of the shape (length, width), into their place on the disk."""
        vector = self.width * np.dtype(_NUMPY_TYPES[self.dtype]).itemsize
        with open(self.folder / "activations.bin", "r+b") as file:
            for row, values in zip(rows, vectors, strict=True):
                if values.shape != (self.lengths[row], self.width):
                    raise ValueError(f"Row {row} has {self.lengths[row]} x {self.width} values, not {values.shape}")
                stored = values.detach().cpu().to(getattr(torch, self.dtype)).contiguous()
                if not stored.isfinite().all():
                    raise CannotPrecompute(
                        f"What leaves the frozen layers for row {row} is not finite in {self.dtype}"
                    )
                file.seek(int(self.starts[row]) * vector)
                file.write(stored.view(torch.uint8).numpy().tobytes())
            _to_disk(file)
        if self.has_positions:
            with open(self.folder / "positions.bin", "r+b") as file:
                for row, position in zip(rows, positions, strict=True):
                    file.seek(4 * int(row))
                    file.write(np.int32(position).tobytes())
                _to_disk(file)
        with open(self.folder / "done.bin", "r+b") as file:
            file.seek(part)
            file.write(b"\1")
            _to_disk(file)

    def finish(self) -> None:
        """Mark it as complete."""
        assert not self.missing_parts()
        write_json(self.folder / "complete.json", {**self.description, "checksum": self._checksum()})

    # Reading

    @cached_property
    def _vectors(self) -> np.ndarray:
        shape = (int(self.starts[-1]), self.width)
        return np.memmap(self.folder / "activations.bin", dtype=_NUMPY_TYPES[self.dtype], mode="r", shape=shape)

    @cached_property
    def positions(self) -> np.ndarray:
        """The position of each row's single vector among the row's tokens, shape (rows,), int32."""
        return np.fromfile(self.folder / "positions.bin", dtype=np.int32)

    def fetch(self, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """The vectors of some rows, one row after another, shape (sum of their lengths, width)."""
        rows = np.asarray(rows)
        if self.starts[-1] == len(self.lengths):  # a vector a row
            found = self._vectors[rows]
        else:
            found = np.concatenate([self._vectors[self.starts[row] : self.starts[row + 1]] for row in rows])
        values = torch.from_numpy(found)
        return values.view(torch.bfloat16) if self.dtype == "bfloat16" else values

    def __getstate__(self) -> dict[str, Any]:
        """A data loader's worker gets the paths, and maps the files itself."""
        return {name: value for name, value in vars(self).items() if name not in ("_vectors", "positions")}


def build(
    entries: Sequence[Entry],
    order: np.ndarray,
    compute: Callable[[np.ndarray], Sequence[tuple[Sequence[torch.Tensor], Sequence[int]]]],
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], object] = lambda: None,
    on_part: Callable[[int, int], None] = lambda done, parts: None,
) -> int:
    """Compute what is missing of some entries for the same rows, all from one pass, and mark them complete.

    A build that was interrupted goes on with the parts that are missing, whatever the number of processes.

    Args:
        entries: The entries; prepared, and locked by the caller.
        order: The rows in the order in which they are computed, shape (rows,): those of similar length together.
        compute: Row numbers -> for each entry the vectors of these rows and their positions.
        rank: The number of this process; parts are dealt out to all processes in turn.
        world_size: How many processes there are.
        barrier: Waits until all processes have called it.
        on_part: Called with the number of parts done and in all, of this process.

    Returns:
        How many parts this process computed.
    """
    parts = sorted({part for entry in entries for part in entry.missing_parts()})
    barrier()  # all have looked before the first one writes
    mine = parts[rank::world_size]
    for number, part in enumerate(mine):
        rows = order[part * ROWS_IN_A_PART : (part + 1) * ROWS_IN_A_PART]
        for entry, (vectors, positions) in zip(entries, compute(rows), strict=True):
            entry.write(part, rows, vectors, positions)
        on_part(number + 1, len(mine))
    barrier()
    if rank == 0:
        for entry in entries:
            entry.finish()
    barrier()
    return len(mine)


@contextmanager
def locked(folder: Path, say: Callable[[str], None] = lambda line: None, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of an entry; another process that wants it waits. The system frees it when the holder dies.

    Args:
        folder: The entry's folder.
        say: Told in one line that another process has it, before waiting for it.
        shared: Hold it together with others who only read the entry.
    """
    import fcntl  # here, as Windows has none

    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(folder.with_suffix(".lock"), "w") as file:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"Another run is at work on the same activations in {folder.parent}: waiting for it")
                fcntl.flock(file, kind)
            if _is_there(file):  # else whoever held it removed it, and the next one makes another
                yield
                return


@contextmanager
def in_use(entries: Sequence[Entry]) -> Iterator[None]:
    """While it lasts, `remove_cache` leaves these entries where they are.

    Raises:
        CannotPrecompute: One of them is not there any more.
    """
    with ExitStack() as locks:
        for folder in sorted({entry.folder for entry in entries}):
            locks.enter_context(locked(folder, shared=True))
        for entry in entries:
            if not entry.is_complete:
                raise CannotPrecompute(f"The activations in {entry.folder} were removed by another process")
        yield


def _is_there(file: Any) -> bool:
    """Whether an open file is still the one of its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False


@contextmanager
def all_or_none(folder: Path) -> Iterator[Callable[..., list[Any]]]:
    """Work on the store that succeeds in all processes or in none, with a meeting of all of them.

    A failure in one of them, also of the disk, is raised in all: there as it is, in the others at their next meeting.

    Args:
        folder: The folder of the cache, for the message.

    Yields:
        `meet(value)`, which waits for all processes and returns the value of each, by rank.

    Raises:
        CannotPrecompute: Something failed; the message says what in one line.
    """
    told = False

    def meet(value: Any = None, failure: str = "") -> list[Any]:
        nonlocal told
        said = gather_object([(value, failure)])
        failures = [line for _, line in said if line]
        if failures:
            told = True
            raise CannotPrecompute(failures[0])
        return [value for value, _ in said]

    try:
        yield meet
    except (InputError, OSError) as error:
        if told:
            raise
        is_ours = isinstance(error, InputError)
        line = str(error) if is_ours else f"The activations could not be computed and kept in {folder}: {error}"
        with suppress(CannotPrecompute):
            meet(failure=line)
        if is_ours:
            raise
        raise CannotPrecompute(line) from error


def check_room(folder: Path, nbytes: int) -> None:
    """Refuse to write more than the disk holds.

    Raises:
        InputError: Less than the bytes and 5 % are free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if nbytes * SPARE_ROOM > free:
        raise InputError(
            f"The activations need {nbytes / 2**20:,.0f} MiB, and the disk of {folder} has {free / 2**20:,.0f} MiB "
            "free: make room, choose another folder (for a plan $ULMFIT_TOOLS_CACHE), or train without precomputing"
        )


def cache_size(cache_dir: str | Path) -> tuple[int, int]:
    """How many entries a folder has, whole or not, and their bytes on the disk."""
    entries = _entry_folders(cache_dir)
    return len(entries), sum(map(_nbytes, entries))


def _entry_folders(cache_dir: str | Path) -> list[Path]:
    """The folders in a folder that are this store's: by their names and by what is in them.

    One that a kill left without `entry.json` is one of them.
    """
    named = (path for path in Path(cache_dir).glob("*") if re.fullmatch("[0-9a-f]{32}", path.name) and path.is_dir())
    return [folder for folder in named if {file.name.removeprefix(STAGING) for file in folder.iterdir()} <= _FILES]


def remove_cache(cache_dir: str | Path) -> int:
    """Delete all entries in a folder, and nothing else in it; those that a run is using are left, which is said.

    Returns:
        How many bytes were freed.
    """
    freed = [remove_entry(folder) for folder in _entry_folders(cache_dir)]
    left = freed.count(None)
    if left:
        logger.warning(f"{left} of {len(freed)} sets of activations are in use and were left: remove them later")
    return sum(nbytes for nbytes in freed if nbytes is not None)


def remove_entry(folder: Path) -> int | None:
    """Delete an entry and its lock.

    Returns:
        How many bytes were freed; None where another process uses the entry, and nothing was deleted.
    """
    import fcntl

    with open(folder.with_suffix(".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if not _is_there(file):  # another process has just removed it, and a third one may be building
            return None
        nbytes = _nbytes(folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.unlink(file.name)  # while it is held, so that nobody else holds it
        return nbytes


def _nbytes(folder: Path) -> int:
    total = 0
    with suppress(FileNotFoundError):  # a run may be at work in it
        for file in folder.iterdir():
            total += file.stat().st_size
    return total


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
