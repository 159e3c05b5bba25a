"""The one pass over the frozen layers: which rows, in which form, from which weights, and into which entries."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, __version__

from ulmfit_tools.activation_store import Entry, all_or_none, build, check_room, locked, remove_entry
from ulmfit_tools.errors import InputError
from ulmfit_tools.freeze_boundary import (
    Boundary,
    CannotPrecompute,
    Enough,
    Replay,
    adapters_in_use,
    capturing,
    in_batch,
    in_row,
    one_token,
    padded,
)
from ulmfit_tools.replay_check import (
    batches_are_read,
    check_replay,
    in_eval_mode,
    read_positions,
    rounding_error,
    same_vectors,
    seconds_of,
    seconds_saved,
    tried,
)
from ulmfit_tools.restoring import own_random_numbers
from ulmfit_tools.row_source import Batch, Source, a_few, content_key, slices

logger = logging.getLogger(__name__)

_TOKENS_AT_ONCE = 8192  # that go through the frozen layers together: enough to keep any device busy
# Of a model's configuration: the labels, and what a first loss and a first saving write into it.
_NOT_THE_LAYERS = {"id2label", "label2id", "problem_type", "architectures", "dtype", "_name_or_path", "use_cache"}
_DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """What was precomputed.

    Args:
        boundary: The name of the last frozen block.
        form: "vector" (one vector a row: all that the head reads) or "sequence" (one for each token).
        dtype: The type in which they are stored.
        error: The largest error of the logits that this type makes, as a share of the largest logit; on a few rows.
        nbytes: Size on disk.
        seconds: Wall time of the pass; 0 where all was found.
        reused: Whether all was found.
        break_even_epochs: After how many epochs of training the pass pays, by the time of a step of either kind.
    """

    boundary: str
    form: str
    dtype: str
    error: float
    nbytes: int
    seconds: float
    reused: bool
    break_even_epochs: float


class FrozenPass:
    """Finds or makes the activations of some datasets at the boundary of a trainer's model.

    Args:
        trainer: The trainer.
        boundary: Its model's boundary.
        sources: Its datasets, the training rows first.
        cache_dir: The folder of the cache.

    Attributes:
        form: "vector" or "sequence"; settled by `make`.
        entries: One for each source; complete after `make`.
        replay: What runs the model from them.
        dtype: The type in which the layers give them.
    """

    def __init__(self, trainer: Trainer, boundary: Boundary, sources: Sequence[Source], cache_dir: Path) -> None:
        assert isinstance(trainer.model, nn.Module)
        self.trainer = trainer
        self.args = trainer.args
        self.accelerator = trainer.accelerator
        self.model = trainer.model
        self.boundary = boundary
        self.sources = sources
        self.cache_dir = cache_dir
        self.replay = Replay(self.model, boundary)
        self.form = "sequence"
        self.entries: list[Entry] = []
        self.dtype = torch.float32
        self._digests: dict[str, str] = {}  # of the frozen tensors; they do not change while this is used

    def digests(self, boundary: Boundary) -> dict[str, str]:
        """What the weights and buffers of the layers up to a boundary are, by name."""
        tensors = [*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers()]
        for name, tensor in tensors:
            if boundary.holds(name) and name not in self._digests:
                self._digests[name] = content_key(tensor)
        return {name: digest for name, digest in self._digests.items() if boundary.holds(name)}

    def weights_key(self, boundary: Boundary) -> str:
        """What the layers up to a boundary are: weights, buffers, adapters, configuration, precision, versions."""
        config: Any = getattr(self.model, "config", None)
        described = {} if config is None else config.to_dict()
        kept = {key: value for key, value in described.items() if key not in _NOT_THE_LAYERS}
        kept["attention"] = getattr(config, "_attn_implementation", None)  # there is no public name for it
        setting = [kept, self.args.bf16, self.args.fp16, self.args.device.type, torch.__version__, __version__]
        adapters = adapters_in_use(self.model, boundary)
        return content_key(type(self.model).__name__, setting, adapters, self.digests(boundary))

    def make(self, dtype: str, to_come: Sequence[Boundary]) -> CacheReport:
        """Settle the form, check it, tell the size and the cost, and compute what is not there."""
        dtype, error, even, missing = self._try_out(dtype)
        nbytes = sum(entry.nbytes for entry in self.entries)
        reused = not any(missing)
        size = f"{nbytes / 2**20:,.1f} MiB of {dtype} ({self.form}s)"
        if reused:
            self._say(f"What leaves {self.boundary.path} is there already: {size}")
        else:
            inexact = f", which moves the logits by {error:.1e} of the largest" if error else ""
            self._say(
                f"Precomputing what leaves {self.boundary.path} for {sum(map(len, self.sources)):,} rows: "
                f"{size}{inexact}; pays after {even:.1f} epochs"
            )
        start = time.perf_counter()
        if not reused:
            self._build(missing, to_come)
        seconds = 0.0 if reused else round(time.perf_counter() - start, 2)
        return CacheReport(
            boundary=self.boundary.path,
            form=self.form,
            dtype=dtype,
            error=error,
            nbytes=nbytes,
            seconds=seconds,
            reused=reused,
            break_even_epochs=round(even, 2),
        )

    def _entry(self, boundary: Boundary, source: Source, form: str, width: int, dtype: str) -> Entry:
        key = content_key(self.weights_key(boundary), source.fingerprint, form, dtype)
        lengths = np.ones(len(source), dtype=np.int32) if form == "vector" else source.lengths
        return Entry(self.cache_dir / key, lengths, width, dtype, has_positions=form == "vector")

    # Trying it on a few rows

    def _try_out(self, dtype: str) -> tuple[str, float, float, list[bool]]:
        """Settle the form and the entries; all processes do, or none.

        Returns:
            The type to store, the error that it makes, after how many epochs the pass pays, and which entries are to
            be computed.
        """
        with all_or_none(self.cache_dir) as meet:
            source = self.sources[0]
            rows = a_few(source.order)
            self._settle_form(source, rows)
            self.form = "sequence" if "sequence" in meet(self.form) else "vector"
            vectors, at = self._vectors(source, rows, [self.boundary])[0]
            self.dtype = vectors[0].dtype
            dtype = _DTYPE_NAMES.get(self.dtype, "float32") if dtype == "auto" else dtype
            error = self._storage_error(source, rows, vectors, at, dtype)
            width = vectors[0].shape[-1]
            self.entries = [self._entry(self.boundary, one, self.form, width, dtype) for one in self.sources]
            even = self._break_even(source)
            missing: list[bool] = meet(self._missing())[0]
        return dtype, error, even, missing

    def _settle_form(self, source: Source, rows: np.ndarray) -> None:
        """Find the smallest form from which the layers above give the same numbers; in full precision.

        Raises:
            CannotPrecompute: None does.
        """
        together, labels = self._to_device(source.inputs(rows)), self._to_device(source.labels(rows))

        def loss(batch: Mapping[str, torch.Tensor]) -> Any:
            with own_random_numbers(self.args.device):  # which both sides of the comparison share
                return self.trainer.compute_loss(self.model, {**batch, **labels}, num_items_in_batch=len(rows))

        with in_eval_mode(self.model), tried(self.model, "does not run on single rows or without labels"):
            hidden = self.replay.learn(together)
            if hidden.shape[:2] != together["input_ids"].shape:
                raise CannotPrecompute(f"{self.boundary.path} does not put out one vector for each token")
            # In training they come from batches of other rows, padded otherwise: here, without any padding at all.
            alone = [self._vectors(source, rows[i : i + 1], [self.boundary], autocast=False) for i in range(len(rows))]
            vectors = [found[0][0][0] for found in alone]
            _, positions = read_positions(self.model, self.boundary, together)
        if positions is not None and not batches_are_read(self.trainer):
            at = in_row(positions, together["attention_mask"])
            ones = torch.stack([vector[i] for vector, i in zip(vectors, at, strict=True)])[:, None]
            try:
                check_replay(self.replay, together, ones, one_token(together, positions), loss)
                self.form = "vector"
                return
            except CannotPrecompute:
                pass  # it reads more of the batch than that token
        check_replay(self.replay, together, padded(torch.cat(vectors), together["attention_mask"]), loss=loss)

    def _storage_error(
        self, source: Source, rows: np.ndarray, vectors: list[torch.Tensor], at: list[int], dtype: str
    ) -> float:
        """How far the logits of a few rows move when their activations are stored in a type."""
        stored = getattr(torch, dtype)
        if stored == vectors[0].dtype:
            return 0.0
        inputs = self._to_device(source.inputs(rows))
        if self.form == "vector":
            inputs = one_token(inputs, in_batch(at, inputs["attention_mask"]))
        with in_eval_mode(self.model), self.accelerator.autocast():
            cached = padded(torch.cat(vectors), inputs["attention_mask"])
            error = rounding_error(self.replay, inputs, cached, stored)
        if not math.isfinite(error):
            raise CannotPrecompute(f"{dtype} cannot hold what leaves {self.boundary.path}: use bfloat16 or float32")
        return error

    def _break_even(self, source: Source) -> float:
        """Epochs until the pass has paid: its time over what an epoch saves.

        The pass takes rows of one length together, as in the middle of its order. So does training in batches of like
        length; in random ones it pads all rows to the longest.
        """
        size = min(self.args.train_batch_size, len(source))
        middle = source.order[(len(source) - size) // 2 :][:size]
        by_length = self.args.train_sampling_strategy == "group_by_length"
        rows = middle if by_length else np.random.default_rng(0).choice(len(source), size, replace=False)
        inputs = self._to_device(source.inputs(rows))
        with in_eval_mode(self.model), self.accelerator.autocast():
            forward = seconds_of(lambda: self._vectors(source, middle, [self.boundary]))
            vectors, at = self._vectors(source, rows, [self.boundary])[0]
            ours = one_token(inputs, in_batch(at, inputs["attention_mask"])) if self.form == "vector" else inputs
            saved = seconds_saved(self.replay, inputs, padded(torch.cat(vectors), ours["attention_mask"]), ours)
        return forward * sum(map(len, self.sources)) / (saved * len(source))

    # What is there

    def _missing(self) -> list[bool]:
        """Which entries are to be computed; the first process looks for all."""
        missing = []
        for source, entry in zip(self.sources, self.entries, strict=True) if self._leads else ():
            missing.append(not self._is_good(source, self.boundary, entry))
            if missing[-1] and entry.is_complete:
                self._say(
                    f"What was kept of {self.boundary.path} for {len(source):,} rows is damaged, or not what the "
                    "layers put out now: it is computed anew"
                )
        return missing

    def _is_good(self, source: Source, boundary: Boundary, entry: Entry) -> bool:
        return entry.is_sound() and self._agrees(source, boundary, entry)

    def _agrees(self, source: Source, boundary: Boundary, entry: Entry) -> bool:
        """Whether what is kept of an entry, whole or in part, is what the layers put out for a few rows of it.

        The key does not tell two versions of a model's code apart.
        """
        rows = a_few(entry.written(source.order))
        if not len(rows):
            return True
        vectors, at = self._vectors(source, rows, [boundary])[0]
        kept = replace(entry)  # which has not opened the files: another run may make them anew in the meantime
        computed = torch.cat(vectors)
        precision = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else computed.dtype
        same = same_vectors(kept.fetch(rows), computed, precision)
        return same and (not at or kept.positions[rows].tolist() == at)

    # The pass

    def _build(self, missing: Sequence[bool], to_come: Sequence[Boundary]) -> None:
        """Compute the entries, and in the same pass those of the boundaries to come where the disk has room."""
        wanted: list[list[tuple[Boundary, Entry]]] = []
        try:
            with ExitStack() as locks, all_or_none(self.cache_dir) as meet:
                wanted = meet(self._wanted(missing, to_come) if self._leads else None)[0]
                # In one order in all runs, so that no two wait for each other; rows may be there twice.
                folders = sorted({entry.folder for pairs in wanted for _, entry in pairs})
                for folder in folders if self._leads else ():
                    locks.enter_context(locked(folder, self._say))
                for source, pairs in zip(self.sources, wanted, strict=True):
                    self._build_entries(source, pairs, meet)
        except CannotPrecompute:
            for entry in [entry for pairs in wanted for _, entry in pairs if self._leads and not entry.is_complete]:
                with suppress(OSError):
                    remove_entry(entry.folder)  # the disk may be full, and the training that follows needs it
            raise

    def _wanted(self, missing: Sequence[bool], to_come: Sequence[Boundary]) -> list[list[tuple[Boundary, Entry]]]:
        """For each source what is to be computed."""
        width, dtype = self.entries[0].width, self.entries[0].dtype
        wanted = [[(self.boundary, entry)] * absent for entry, absent in zip(self.entries, missing, strict=True)]
        room = sum(entry.nbytes_to_come for pairs in wanted for _, entry in pairs)
        check_room(self.cache_dir, room)
        for boundary in {one.path: one for one in to_come if one.path != self.boundary.path}.values():
            more = [self._entry(boundary, source, "sequence", width, dtype) for source in self.sources]
            if all(entry.is_complete for entry in more):
                continue
            size = sum(entry.nbytes_to_come for entry in more if not entry.is_complete)
            try:
                check_room(self.cache_dir, room + size)
            except InputError:
                self._say(f"What leaves {boundary.path} is left for later: no room for {size / 2**20:,.1f} MiB beside")
                continue
            room += size
            self._say(f"The same pass keeps what leaves {boundary.path} for a later phase: {size / 2**20:,.1f} MiB")
            for pairs, entry in zip(wanted, more, strict=True):
                pairs += [(boundary, entry)] * (not entry.is_complete)
        return wanted

    def _build_entries(
        self, source: Source, pairs: list[tuple[Boundary, Entry]], meet: Callable[..., list[Any]]
    ) -> None:
        lower = None
        if self._leads:
            # Another run may have made them while this one waited for the locks.
            pairs = [pair for pair in pairs if not self._is_good(source, *pair)]
            for boundary, entry in pairs:
                entry.prepare(keep=self._agrees(source, boundary, entry))
            lower = self._find_lower(source, pairs) if pairs else None
        pairs, lower = meet((pairs, lower))[0]
        if not pairs:
            return
        boundaries, entries = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

        def compute(rows: np.ndarray) -> list[tuple[list[torch.Tensor], list[int]]]:
            found: list[tuple[list[torch.Tensor], list[int]]] = [([], []) for _ in entries]
            size = max(1, _TOKENS_AT_ONCE // max(1, int(source.lengths[rows].max())))
            for some in slices(rows, size):
                results = self._vectors(source, some, boundaries, lower=lower)
                for (vectors, at), (kept, positions) in zip(results, found, strict=True):
                    kept += vectors
                    positions += at
            return found

        hidden = self.args.disable_tqdm or not self._leads
        with tqdm(desc="Precomputing", unit=" part", disable=hidden) as bar:

            def show(done: int, parts: int) -> None:
                bar.total = parts
                bar.update(done - bar.n)

            rank, world = self.args.process_index, self.args.world_size
            build(entries, source.order, compute, rank=rank, world_size=world, barrier=meet, on_part=show)

    def _find_lower(self, source: Source, pairs: list[tuple[Boundary, Entry]]) -> tuple[Boundary, Entry] | None:
        """The highest boundary below the ones to be made whose activations are there: the pass can begin at it."""
        if pairs[0][1].dtype != _DTYPE_NAMES.get(self.dtype, "float32"):
            return None  # rounded on the way in, it would be rounded again on the way out
        lowest = min((boundary for boundary, _ in pairs), key=lambda boundary: len(boundary.blocks))
        for count in range(len(lowest.blocks) - 1, 0, -1):
            below = lowest.cut(count)
            entry = self._entry(below, source, "sequence", pairs[0][1].width, pairs[0][1].dtype)
            if self._is_good(source, below, entry):
                self._say(f"The pass begins at what leaves {below.path}, which is there")
                return below, entry
        return None

    def _vectors(
        self,
        source: Source,
        rows: np.ndarray,
        boundaries: Sequence[Boundary],
        *,
        lower: tuple[Boundary, Entry] | None = None,
        autocast: bool = True,
    ) -> list[tuple[list[torch.Tensor], list[int]]]:
        """What leaves each boundary for some rows: for each row a tensor of the shape (its tokens, width).

        In the vector form it is, for this pass's own boundary, one vector a row, with its position among the tokens.
        """
        inputs = self._to_device(source.inputs(rows))
        mask = inputs["attention_mask"].bool()
        ours = [boundary.path == self.boundary.path and self.form == "vector" for boundary in boundaries]
        replay = None if lower is None else Replay(self.model, lower[0], like=self.replay)
        highest = max(boundaries, key=lambda boundary: len(boundary.blocks)).path
        last = highest if self.replay.calls[highest] == 1 else None
        with (
            in_eval_mode(self.model),
            torch.no_grad(),
            self.accelerator.autocast() if autocast else nullcontext(),
            replay.installed() if replay else nullcontext(),
            capturing(self.model, [b.path for b in boundaries], last=None if any(ours) else last) as captured,
            suppress(Enough),
        ):
            if replay is not None and lower is not None:
                replay.activations = padded(lower[1].fetch(rows).to(mask.device), mask)
            if any(ours):
                hidden, positions = read_positions(self.model, self.boundary, inputs)
            else:
                self.model(**inputs)
        results: list[tuple[list[torch.Tensor], list[int]]] = []
        for boundary, is_ours in zip(boundaries, ours, strict=True):
            if not is_ours:
                tokens = zip(captured[boundary.path], mask, strict=True)
                results.append(([row[kept] for row, kept in tokens], []))
            elif positions is None:
                raise CannotPrecompute("The head reads one position of some rows, and none or several of others")
            else:
                vectors = hidden.gather(1, positions[:, None, None].expand(-1, 1, hidden.shape[-1]))
                results.append((list(vectors), in_row(positions, mask)))
        return results

    def _to_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.args.device) for name, value in batch.items()}

    @property
    def _leads(self) -> bool:
        return self.args.process_index == 0

    def _say(self, line: str) -> None:
        if self._leads:
            logger.warning(line)
