"""One process of a distributed run; `test_distributed.py` launches several, and calls `train` itself for a single one.

python distributed_worker.py FOLDER KIND... [--resume] [--die-at STEP]
"""

import argparse
import hashlib
import json
import os
import signal
import time
from pathlib import Path

import torch
from tiny import tiny_bert, token_rows
from tiny_text import colour_folder, model_folder
from transformers import Trainer, TrainerCallback, TrainingArguments

from ulmfit_tools import (
    FineTuningPlan,
    GradualUnfreezing,
    InputError,
    Phase,
    discriminative_optimizer,
    freeze_to,
    run_plan,
)
from ulmfit_tools.layers import layer_groups

ROWS_A_STEP = 16
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

UNFREEZING = {
    "epochs": {"by": "epoch"},
    "chain_thaw": {"by": "step", "every": 2, "order": "chain_thaw", "eval_mode_for_frozen": True},
    "plateau": {"by": "plateau", "restore_best": True},
    "checkpointing": {"by": "epoch", "eval_mode_for_frozen": True},
}

PLAN = FineTuningPlan(
    name="from_the_top",
    settings={"learning_rate": 0.01},
    phases=[
        Phase(name="head", train="head", epochs=1),
        Phase(name="top", train=["layer.2", "layer.3", "head"], epochs=1),
        Phase(name="all", epochs=1),
    ],
)


class Notes(TrainerCallback):
    """What this process sees in each step."""

    def __init__(self, die_at=None):
        self.trained, self.weights, self.losses, self.die_at = [], [], [], die_at

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if len(self.trained) == self.die_at and args.process_index == args.world_size - 1:
            (Path(args.output_dir).parent / "died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        groups = layer_groups(model)
        self.trained.append(sorted({groups.index_of(n) for n, p in model.named_parameters() if p.grad is not None}))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        digest = hashlib.sha256()
        for tensor in model.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        self.weights.append(digest.hexdigest())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


class MeanTrainer(Trainer):
    """BERT's loss is a plain mean; Trainer takes it for another kind, and would multiply it by the processes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


REFUSED = {
    "find_unused": {"ddp_find_unused_parameters": False},
    "checkpointing": {"activation_checkpointing": True},
    "static_graph": {"ddp_static_graph": True},
    "frozen_before": {},
}


def refusals(folder):
    """The error that each of these settings meets."""
    lines = {}
    for kind, settings in REFUSED.items():
        args = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1, **settings)
        model = tiny_bert()
        if kind == "frozen_before":
            freeze_to(model, -1)
        factory = discriminative_optimizer(args)
        callbacks = [GradualUnfreezing()]
        trainer = Trainer(
            model, args, train_dataset=token_rows(48), callbacks=callbacks, optimizer_cls_and_kwargs=factory
        )
        try:
            trainer.train()
        except InputError as error:
            lines[kind] = str(error)
    return lines


def train(folder, kind, *, resume=False, die_at=None):
    """Run one kind of unfreezing and return what this process saw of it."""
    if kind == "refusals":
        return refusals(folder)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    notes = Notes(die_at)
    settings = {
        "per_device_train_batch_size": ROWS_A_STEP // processes,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "lr_scheduler_type": "constant",
    }
    if kind == "plan":
        run_settings = settings | {"ddp_find_unused_parameters": False}
        start = {"model": str(folder / "start"), "data": str(folder / "data")}
        run_plan(PLAN, **start, output_dir=folder / "run", resume=resume, callbacks=[notes], **run_settings)
    else:
        args = TrainingArguments(
            str(folder / "run"),
            num_train_epochs=4,
            learning_rate=0.5,
            optim="sgd",
            save_strategy="epoch",
            report_to=[],
            activation_checkpointing=kind == "checkpointing",
            ddp_find_unused_parameters=True if kind == "checkpointing" else None,
            **settings,
        )
        trainer = MeanTrainer(
            tiny_bert(**NO_DROPOUT),
            args,
            train_dataset=token_rows(48),
            eval_dataset=token_rows(32, seed=1),
            callbacks=[GradualUnfreezing(**UNFREEZING[kind]), notes],
        )
        trainer.train(resume_from_checkpoint=resume)
    return {"trained": notes.trained, "weights": notes.weights, "losses": notes.losses}


def prepare(folder):
    """What a plan run reads: a model and a dataset on disk."""
    model_folder(folder / "start", **NO_DROPOUT)
    colour_folder(folder / "data")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("kinds", nargs="+")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--die-at", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for kind in options.kinds:
        seen = train(options.folder / kind, kind, resume=options.resume, die_at=options.die_at)
        rank = os.environ.get("RANK", "0")
        (options.folder / kind / f"rank-{rank}.json").write_text(json.dumps(seen))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
