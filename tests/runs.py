"""Small training runs that can be stopped, resumed and compared to the bit."""

import copy
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from tiny import pad_rows, ragged_rows, tiny_bert
from transformers import Trainer, TrainerCallback, TrainingArguments

from ulmfit_tools.trainer import ULMFiTTrainer, ULMFiTTrainingArguments

STEPS_PER_EPOCH = 10  # 40 rows in batches of 4
TIMES = ("runtime", "per_second")


def make_trainer(folder, *, plain: bool = False, callbacks=None, model=None, **settings) -> Trainer:
    """A trainer for 2 epochs of 10 steps, dropout and length grouping on; `plain` makes it transformers' own."""
    defaults = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "save_steps": 1,
        "save_total_limit": 0,
        "logging_steps": 3,
        "eval_strategy": "epoch",
        "train_sampling_strategy": "group_by_length",
        "restore_callback_states_from_checkpoint": True,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "logging_nan_inf_filter": False,
    }
    arguments, trainer = (TrainingArguments, Trainer) if plain else (ULMFiTTrainingArguments, ULMFiTTrainer)
    return trainer(
        model=tiny_bert(num_hidden_layers=2) if model is None else model,
        args=arguments(str(folder), **(defaults | settings)),
        train_dataset=ragged_rows(),
        eval_dataset=ragged_rows(12, seed=1),
        data_collator=pad_rows,
        callbacks=callbacks,
    )


def outcome(trainer: Trainer) -> dict:
    """All that a run comes to: weights, optimizer, schedule, random numbers, log, best checkpoint."""
    history = [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in trainer.state.log_history]
    best = trainer.state.best_model_checkpoint
    return {
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "optimizer": copy.deepcopy(trainer.optimizer.state_dict()),
        "schedule": copy.deepcopy(trainer.lr_scheduler.state_dict()),
        "random": (torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1]),  # noqa: NPY002
        "history": history,
        "step": (trainer.state.global_step, trainer.state.epoch),
        "best": (trainer.state.best_metric, trainer.state.best_global_step, best and Path(best).name),
    }


def differences(expected, got, where: str = "") -> list[str]:
    """The places in which two outcomes differ, to the bit; empty where they are identical."""
    if isinstance(expected, dict) and isinstance(got, dict):
        keys = sorted({*expected, *got}, key=str)
        return [line for k in keys for line in differences(expected.get(k), got.get(k), f"{where}/{k}")]
    if isinstance(expected, (list, tuple)) and isinstance(got, (list, tuple)) and len(expected) == len(got):
        pairs = enumerate(zip(expected, got, strict=True))
        return [line for i, pair in pairs for line in differences(*pair, f"{where}/{i}")]
    if isinstance(expected, torch.Tensor) and isinstance(got, torch.Tensor):
        return [] if torch.equal(expected, got) else [where]
    if isinstance(expected, np.ndarray) and isinstance(got, np.ndarray):
        return [] if np.array_equal(expected, got) else [where]
    return [] if expected == got else [f"{where}: {expected!r} != {got!r}"]


def copy_until(run: Path, folder: Path, step: int) -> Path:
    """The run as it lay on the disk after the checkpoint of a step."""
    folder.mkdir(parents=True)
    for path in run.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) <= step:
            shutil.copytree(path, folder / path.name)
    return folder


class Killed(BaseException):
    """Stands for the death of the process: nothing catches it."""


class KillAt(TrainerCallback):
    """Kills the run in an event of a step."""

    def __init__(self, event: str, step: int):
        def kill(args, state, control, **kwargs):
            if state.global_step == step:
                raise Killed

        setattr(self, event, kill)
