"""One of the processes of `test_lr_range_distributed.py`: range tests in DDP, and the trainings after them.

python lr_range_worker.py FOLDER
"""

import hashlib
import json
import logging
import sys
from pathlib import Path

import torch
from tiny import pad_rows, ragged_rows, tiny_bert
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments, set_seed

from ulmfit_tools.lr_range import find_learning_rate, lr_range_test
from ulmfit_tools.trainer import ULMFiTTrainer, ULMFiTTrainingArguments

SHORT = {"num_steps": 24, "start_lr": 1e-5, "end_lr": 1.0}


class OneDiverges(Trainer):
    """The loss of the second process alone becomes nan."""

    calls = 0

    def compute_loss(self, *args, **kwargs):
        type(self).calls += 1
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.args.process_index == 1 and type(self).calls > 15 else loss


def make_trainer(folder, kind, arguments, **settings):
    set_seed(0)
    args = arguments(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=1e-3,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    rows = {"train_dataset": ragged_rows(40), "eval_dataset": ragged_rows(16, seed=3)}
    return kind(model=tiny_bert(), args=args, data_collator=pad_rows, **rows)


def digest(model):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in model.state_dict().values())).hexdigest()


def trained(trainer):
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    return digest(trainer.model)


def compare(folder, kind, arguments, **settings):
    """Training without a test, after one, and again after another one between two trainings."""
    plain = make_trainer(folder, kind, arguments, **settings)
    without = [trained(plain), trained(plain)]
    trainer = make_trainer(folder, kind, arguments, **settings)
    first = lr_range_test(trainer, confirm=True, **SHORT)
    ends = [trained(trainer)]
    second = lr_range_test(trainer, eval_batches=1, **SHORT)
    ends.append(trained(trainer))
    curves = [{**json.loads(curve.to_json()), "seconds": 0} for curve in (first, second)]
    return {"without": without, "with": ends, "curves": curves}


def main(folder):
    found = {
        "Trainer": compare(folder, Trainer, TrainingArguments),
        "accumulating": compare(folder, Trainer, TrainingArguments, gradient_accumulation_steps=2),
        "ULMFiTTrainer": compare(folder, ULMFiTTrainer, ULMFiTTrainingArguments),
    }
    curve = lr_range_test(make_trainer(folder, OneDiverges, TrainingArguments), **SHORT)
    found["one diverges"] = [curve.stopped, len(curve.losses)]
    trainer = make_trainer(folder, ULMFiTTrainer, ULMFiTTrainingArguments)
    rates = [
        find_learning_rate(trainer, folder / "lr_range.json", **SHORT | {"end_lr": 10}).suggestion for _ in range(2)
    ]
    found["found"] = [*rates, trainer.args.learning_rate]
    trainer = make_trainer(folder, Trainer, TrainingArguments)
    found["entropy"] = lr_range_test(trainer, num_steps=25, start_lr=1e-9, end_lr=1e-6).label_entropy
    (folder / f"rank-{trainer.args.process_index}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main(Path(sys.argv[1]))
