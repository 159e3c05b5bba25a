"""One of the processes of `test_feature_cache.py`: a training from activations, and the same through the layers.

python feature_cache_worker.py FOLDER
"""

import errno
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from tiny import pad_rows, ragged_rows, tiny_bert
from transformers import Trainer, TrainingArguments

from ulmfit_tools.activation_store import Entry
from ulmfit_tools.feature_cache import CannotPrecompute, precomputed
from ulmfit_tools.freezing import freeze_to
from ulmfit_tools.frozen_pass import FrozenPass


def make_trainer(folder, frozen_to):
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    freeze_to(model, frozen_to)
    args = TrainingArguments(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(model=model, args=args, train_dataset=ragged_rows(600), data_collator=pad_rows)


def losses(folder, frozen_to, cached):
    """The losses of a training of six steps, and how many rows this process sent through the frozen layers."""
    trainer, rows = make_trainer(folder, frozen_to), []
    own = FrozenPass._vectors

    def counted(self, source, some, *more, **settings):
        rows.extend(some.tolist())
        return own(self, source, some, *more, **settings)

    FrozenPass._vectors = counted
    try:
        with precomputed(trainer, cache_dir=folder / "cache") if cached else nullcontext():
            trainer.train()
    finally:
        FrozenPass._vectors = own
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], len(rows)


def refusal(folder, rank):
    """What is said where the second process cannot write."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    own = Entry.write
    if rank == 1:
        Entry.write = full
    try:
        with precomputed(make_trainer(folder, -1), cache_dir=folder / "full"):
            return ""
    except CannotPrecompute as error:
        return str(error)
    finally:
        Entry.write = own


def refusal_of_one(folder, rank):
    """What is said where the collator of the second process is random; both train through the layers then."""

    def collate(rows):
        batch = pad_rows(rows)
        if rank == 1:
            batch["input_ids"][:, 1] = torch.randint(5, 60, (len(rows),))
        return batch

    trainer = make_trainer(folder, -1)
    trainer.data_collator = collate
    try:
        with precomputed(trainer, cache_dir=folder / "random"):
            return ""
    except CannotPrecompute as error:
        trainer.train()
        return str(error)


def main(folder):
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    found = {str(n): [losses(folder, n, False)[0], *losses(folder, n, True)] for n in (-1, -3)}
    found["full"] = refusal(folder, rank)
    found["random"] = refusal_of_one(folder, rank)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()  # left to the interpreter's end, it may abort a process that is done


if __name__ == "__main__":
    main(Path(sys.argv[1]))
