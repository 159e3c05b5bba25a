"""Activations on disk: ragged, memory-mapped, built in parts that survive a crash, found by what they were made from.

CACHE_DIR/
  4f6c.../entry.json         what the entry holds; its presence marks the folder as one of this store
  4f6c.../activations.bin    the vectors of all rows, one row after another, no padding
  4f6c.../positions.bin      for entries of one vector a row: which position of the row it is
  4f6c.../done.bin           a byte for each part: 1 once its vectors are on the disk
  4f6c.../complete.json      written last; an entry without it is never read
  4f6c.lock                  held by the process that builds it
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ulmfit_tools.checkpoints import write_json
from ulmfit_tools.errors import InputError

ROWS_IN_A_PART = 256
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
    def parts(self) -> int:
        """In how many parts it is built."""
        return -(-len(self.lengths) // ROWS_IN_A_PART)

    @property
    def description(self) -> dict[str, Any]:
        """What `entry.json` says."""
        lengths = hashlib.sha256(np.ascontiguousarray(self.lengths, dtype=np.int64).tobytes()).hexdigest()
        return {"rows": len(self.lengths), "lengths": lengths, "width": self.width, "dtype": self.dtype}

    @property
    def is_complete(self) -> bool:
        """Whether it can be read."""
        try:
            return json.loads((self.folder / "complete.json").read_text()) == self.description
        except (OSError, ValueError):
            return False

    def missing_parts(self) -> list[int]:
        """The parts that are still to be built."""
        done = np.frombuffer((self.folder / "done.bin").read_bytes(), dtype=np.uint8)
        return np.flatnonzero(done == 0).tolist()

    # Writing

    def prepare(self) -> None:
        """Make the files in their full size, unless an interrupted build of the same entry left them."""
        try:
            if json.loads((self.folder / "entry.json").read_text()) == self.description:
                return
        except (OSError, ValueError):
            pass
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        sizes = {"activations.bin": self.nbytes, "done.bin": self.parts}
        if self.has_positions:
            sizes["positions.bin"] = 4 * len(self.lengths)
        for name, size in sizes.items():
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
                file.seek(int(self.starts[row]) * vector)
                bits = values.detach().cpu().to(getattr(torch, self.dtype)).contiguous().view(torch.uint8)
                file.write(bits.numpy().tobytes())
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
        write_json(self.folder / "complete.json", self.description)

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
    barrier: Callable[[], None] = lambda: None,
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
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of an entry; another process that wants it waits. The system frees it when the holder dies."""
    import fcntl  # here, as Windows has none

    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"Another run is computing the same activations in {folder.parent}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
            "free: make room, choose another folder or a smaller dtype, or train without precomputing"
        )


def content_key(*parts: Any) -> str:
    """A name for what was made from some content: the same for the same content, on every machine.

    Args:
        *parts: Tensors and arrays (by type, shape and bytes), bytes, or values that JSON can hold.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            part = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        elif isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            part = np.ascontiguousarray(part).tobytes()
        elif not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True, default=str).encode()
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]


def cache_size(cache_dir: str | Path) -> tuple[int, int]:
    """How many entries a folder has, and their bytes on the disk."""
    entries = [marker.parent for marker in Path(cache_dir).glob("*/entry.json")]
    return len(entries), sum(file.stat().st_size for entry in entries for file in entry.iterdir())


def remove_cache(cache_dir: str | Path) -> int:
    """Delete all entries in a folder, and nothing else in it.

    Returns:
        How many bytes were freed.
    """
    freed = cache_size(cache_dir)[1]
    for marker in Path(cache_dir).glob("*/entry.json"):
        shutil.rmtree(marker.parent)
        marker.parent.with_suffix(".lock").unlink(missing_ok=True)
    return freed


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
