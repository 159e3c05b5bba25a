"""The learning-rate range test: one short training over rising rates in the trainer's own steps, and no trace of it.

Smith 2015 (arXiv:1506.01186), section 3.3: let the rate rise from very low to very high during a few updates, and
see where the loss begins to fall and where it stops. The test runs a copy of the trainer that shares its model and
makes its batches, losses, mixed precision, accumulation and clipping in its own way, and puts back all it has changed.
"""

import copy
import logging
import math
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, has_length

from ulmfit_tools.errors import InputError, nearest
from ulmfit_tools.layers import layer_groups
from ulmfit_tools.lr_curve import LRCurve, has_diverged
from ulmfit_tools.restoring import unchanged

logger = logging.getLogger(__name__)

MODES = ("exponential", "linear")
MIN_STEPS = 10


def lr_range_test(
    trainer: Trainer,
    *,
    start_lr: float = 1e-7,
    end_lr: float = 10,
    num_steps: int = 100,
    mode: str = "exponential",
    eval_batches: int = 0,
    offload_folder: str | Path | None = None,
) -> LRCurve:
    """x."""
    _check_sweep(start_lr, end_lr, num_steps, mode)
    _check_trainer(trainer, eval_batches)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    holders = [trainer.data_collator, trainer.train_dataset]
    with unchanged(trainer.model, optimizer, holders=holders, offload_folder=offload_folder):
        recorder = _Recorder(lambda step: sweep_rate(step, start_lr, end_lr, num_steps, mode), eval_batches)
        start = time.perf_counter()
        rehearse(trainer, optimizer, num_steps, recorder)
        recorder.meta["seconds"] = time.perf_counter() - start
    return recorder.curve()


def sweep_rate(step: int, start_lr: float, end_lr: float, num_steps: int, mode: str) -> float:
    share = step / (num_steps - 1)
    return start_lr * (end_lr / start_lr) ** share if mode == "exponential" else start_lr + (end_lr - start_lr) * share


def _check_sweep(start_lr, end_lr, num_steps, mode):
    pass


def _check_trainer(trainer, eval_batches):
    pass


class _Recorder(TrainerCallback):
    def __init__(self, rate_at, eval_batches, stop=has_diverged):
        self.rate_at = rate_at
        self.eval_batches = eval_batches
        self.rates, self.losses = [], []
        self.stopped = "end"
        self.meta = {}
        self.sum = None
        self.stop = stop

    def watch(self, trainer):
        self.trainer = trainer
        step = trainer.training_step

        def training_step(*args, **kwargs):
            loss = step(*args, **kwargs)
            self.sum = loss if self.sum is None else self.sum + loss
            return loss

        trainer.training_step = training_step

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kw):
        if self.eval_batches:
            ds = self.trainer.eval_dataset
            rows = min(len(ds), self.eval_batches * args.eval_batch_size * args.world_size)
            idx = [i * len(ds) // rows for i in range(rows)]
            sub = ds.select(idx) if hasattr(ds, "select") else Subset(ds, idx)
            self.batches = list(self.trainer.get_eval_dataloader(sub))
            self._note(self._evaluate(model), control)

    def _evaluate(self, model):
        model.eval()
        ls = [self.trainer.prediction_step(model, b, prediction_loss_only=True)[0] for b in self.batches]
        return torch.stack(ls).mean()

    def _note(self, loss, control):
        v = self.trainer.accelerator.reduce(loss.detach().float(), "mean").item()
        if not math.isfinite(v):
            if not self.losses:
                raise InputError("nan at first")
            self.stopped = "nan"
            control.should_training_stop = True
            return
        self.losses.append(v)
        if self.stop(self.losses):
            self.stopped = "diverged"
            control.should_training_stop = True

    def on_step_end(self, args, state, control, model=None, **kw):
        loss, self.sum = self.sum, None
        if not self.eval_batches and len(self.losses) <= len(self.rates):
            self._note(loss, control)
        if self.trainer.accelerator.optimizer_step_was_skipped:
            return
        self.rates.append(self.rate_at(len(self.rates)))
        if self.eval_batches:
            self._note(self._evaluate(model), control)

    def curve(self):
        return LRCurve(
            rates=tuple(self.rates[: len(self.losses) - 1]),
            losses=tuple(self.losses[1:]),
            start_loss=self.losses[0],
            stopped=self.stopped,
            meta=self.meta,
        )


def rehearse(trainer, optimizer, num_steps, recorder):
    args = copy.copy(trainer.args)
    args.max_steps = num_steps
    args.save_strategy = SaveStrategy.NO
    args.eval_strategy = args.logging_strategy = IntervalStrategy.NO
    args.load_best_model_at_end = args.eval_on_start = args.push_to_hub = args.logging_nan_inf_filter = (
        args.logging_first_step
    ) = False
    r = copy.copy(trainer)
    r.args = args
    r.create_accelerator_and_postprocess()
    r.model_init = None
    r.optimizer, r.lr_scheduler = optimizer, None
    r.control = TrainerControl()
    r.callback_handler = CallbackHandler([DefaultFlowCallback, recorder], r.model, r.processing_class, None, None)

    def create_scheduler(num_training_steps, optimizer=None):
        opt = r.optimizer if optimizer is None else optimizer
        head = opt.param_groups[-1]
        base = head.get("initial_lr", head["lr"])
        r.lr_scheduler = LambdaLR(opt, lambda step: recorder.rate_at(step) / base)
        return r.lr_scheduler

    r.create_scheduler = create_scheduler
    r.log = lambda *a, **k: None
    recorder.watch(r)
    Trainer.train(r)
