"""What a `Trainer` run must carry over a stop beside weights, optimizer and random numbers, and how it is stopped.

`RunKeeper` is the callback that `ULMFiTTrainer` adds to itself. It closes the gaps that keep a resumed plain `Trainer`
run from being the run that was stopped: the loss summed up since the last log, the fact that early stopping had
already ended the run, the best checkpoint's place in a folder that was moved, and checkpoints that were taken in the
last step of an epoch, before the epoch's own evaluation.
"""

import json
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from ulmfit_tools.checkpoints import RECORD, CheckpointError

if TYPE_CHECKING:
    from ulmfit_tools.trainer import ULMFiTTrainer

logger = logging.getLogger(__name__)


class TrainingInterrupted(Exception):
    """Training was asked to stop by a signal, wrote a checkpoint and stopped.

    Attributes:
        checkpoint: The checkpoint, from which the run goes on.
        exit_code: What a program should exit with: 128 + the signal's number, 143 for SIGTERM.
    """

    def __init__(self, checkpoint: Path, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(f"Stopped by {signal.Signals(signal_number).name}; resume to go on from {checkpoint}.")
        self.checkpoint = checkpoint
        self.exit_code = 128 + signal_number


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of the parameters in each optimizer group, in the order in which its state is stored.

    A parameter that the model does not have is named by its shape.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [names.get(id(parameter), f"unnamed {tuple(parameter.shape)}") for parameter in group["params"]]
        for group in optimizer.param_groups
    ]


def read_record(checkpoint: Path) -> dict[str, Any] | None:
    """What `ULMFiTTrainer` recorded in a checkpoint; None for one of a plain `Trainer`."""
    path = checkpoint / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_record(checkpoint: Path, record: dict[str, Any]) -> None:
    """Write what `read_record` reads."""
    (checkpoint / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")


class RunKeeper(TrainerCallback):
    """Keeps a run whole over checkpoints; see the module's text. It must be the last of the callbacks.

    Args:
        trainer: The trainer that it belongs to.
    """

    def __init__(self, trainer: "ULMFiTTrainer") -> None:
        self.trainer = trainer
        self.checkpoint: Path | None = None
        self.record: dict[str, Any] | None = None
        self._signal: int | None = None
        self._stopping = False
        self._postponed = {"should_evaluate": False, "should_save": False}

    def begin(self, checkpoint: Path | None) -> None:
        """Prepare for a run that starts afresh (None) or goes on from a checkpoint."""
        self.checkpoint = checkpoint
        self.record = None if checkpoint is None else read_record(checkpoint)
        self._signal, self._stopping = None, False
        self._postponed = dict.fromkeys(self._postponed, False)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take note of SIGTERM instead of dying from it; afterwards the signal does again what it did before.

        A signal that comes too late for another step is sent again at the end, so it is not lost. Python allows
        signal handlers in the main thread only; elsewhere nothing is done.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _: Any) -> None:
            self._signal = number

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
        if self._signal is not None:
            signal.raise_signal(self._signal)

    def check_optimizer(self, names: Sequence[Sequence[str]]) -> None:
        """Refuse to load the checkpoint's optimizer state into other parameters than it was saved from.

        PyTorch goes by position: with groups of the same sizes it puts the state of one layer on another, without a
        word.

        Args:
            names: The names of the parameters in each optimizer group now.

        Raises:
            CheckpointError: The groups differ; it names the first difference.
        """
        if self.record is None or self.record["optimizer_groups"] == [list(group) for group in names]:
            return
        recorded = self.record["optimizer_groups"]
        before, now = ({name for group in groups for name in group} for groups in (recorded, names))
        if gone := sorted(before - now):
            difference = f"{gone[0]} and {len(gone) - 1} more are not in the optimizer now"
        elif new := sorted(now - before):
            difference = f"{new[0]} and {len(new) - 1} more were not in the optimizer then"
        else:
            difference = f"the {len(names)} parameter groups are divided otherwise than the {len(recorded)} then"
        raise CheckpointError(
            f"The optimizer state of {self.checkpoint} belongs to other parameters: {difference}. Resume with the"
            " layers, layer groups and optimizer of the stopped run, or start a new run from the checkpoint's weights."
        )

    def check_schedule(self, name: str) -> None:
        """Refuse to load the state of one schedule into another, which torch does without a word.

        Args:
            name: The `lr_scheduler_type` now.

        Raises:
            CheckpointError: It was another one.
        """
        if self.record is not None and self.record["lr_scheduler_type"] != name:
            raise CheckpointError(
                f"{self.checkpoint} is of a run with another schedule; resume with the same. Received:"
                f" lr_scheduler_type={name}, in the checkpoint: {self.record['lr_scheduler_type']}"
            )

    def to_record(self, control: TrainerControl, state: TrainerState) -> dict[str, Any]:
        """What goes into the checkpoint; all processes must call it."""
        trainer = self.trainer
        sums = trainer.accelerator.gather(trainer._tr_loss.reshape(1)).tolist()
        return {
            "optimizer_groups": parameter_names(trainer.model, trainer.optimizer),
            "lr_scheduler_type": trainer.args.schedule_name,
            "stopped_early": control.should_training_stop and state.global_step < state.max_steps,
            "loss": {
                "since_last_log": sums,
                "last_logged_step": trainer._globalstep_last_logged,
                "before_last_log": trainer._total_loss_scalar,
            },
        }

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        """Bring back what Trainer's own files do not hold, and see whether anything is left to do."""
        if self.checkpoint is None:
            return control
        self._find_best(state)
        if self.record is not None:
            self._restore_loss(self.record["loss"])
        stopped_early = self.record is not None and self.record["stopped_early"]
        if stopped_early or state.global_step >= state.max_steps:
            why = "it had stopped early" if stopped_early else "all steps are done"
            logger.warning(f"Nothing is left to train after {self.checkpoint.name}: {why}.")
            control.should_training_stop = True
            self.trainer._load_rng_state(str(self.checkpoint))  # Trainer does it on the way to the next step
        return control

    def _find_best(self, state: TrainerState) -> None:
        """The state holds the best checkpoint's path as it was; the run's folder may have been moved or copied."""
        assert self.checkpoint is not None
        if state.best_global_step:
            best = self.checkpoint.with_name(f"checkpoint-{state.best_global_step}")
            if best.is_dir():
                state.best_model_checkpoint = str(best)

    def _restore_loss(self, loss: dict[str, Any]) -> None:
        trainer, sums = self.trainer, loss["since_last_log"]
        same_processes = len(sums) == trainer.args.world_size
        trainer._tr_loss += sums[trainer.args.process_index] if same_processes else sum(sums) / len(sums)
        trainer._globalstep_last_logged = loss["last_logged_step"]
        trainer._total_loss_scalar = loss["before_last_log"]

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        """Ask for a last checkpoint after a signal; put off to the epoch's end what would miss it."""
        if self._stop_requested():
            self._stopping = control.should_save = True
        if float(state.epoch).is_integer() or control.should_training_stop or control.should_epoch_stop:
            # The epoch ends here: what belongs to its end (a log, an evaluation) must be in the checkpoint too.
            for name in self._postponed:
                self._postponed[name] = getattr(control, name)
                setattr(control, name, False)
        return control

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        """Do what the epoch's last step put off."""
        for name, postponed in self._postponed.items():
            setattr(control, name, getattr(control, name) or postponed)
            self._postponed[name] = False
        return control

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the training, now that the last checkpoint is written."""
        if self._stopping:
            raise TrainingInterrupted(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _stop_requested(self) -> bool:
        """Whether any process got the signal; all of them must stop after the same step."""
        received = self._signal is not None
        if self.trainer.args.world_size == 1:
            return received
        flag = torch.tensor([float(received)], device=self.trainer.args.device)
        return bool(self.trainer.accelerator.reduce(flag, reduction="sum").item() > 0)
