"""`transformers.Trainer` with this package's pieces put together: discriminative rates, the schedules, batches of
similar length, and checkpoints from which a run goes on exactly as if it had not stopped.
"""

import dataclasses
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length
from transformers.utils import is_sagemaker_mp_enabled, is_torch_xla_available

from ulmfit_tools import checkpoints
from ulmfit_tools.checkpoints import CheckpointError, NoGoodCheckpoint
from ulmfit_tools.errors import InputError
from ulmfit_tools.gradual_unfreezing import undo_unfreezing
from ulmfit_tools.losses import loss_counts_items
from ulmfit_tools.param_groups import discriminative_optimizer, group_learning_rates
from ulmfit_tools.resuming import RunKeeper, TrainingInterrupted, parameter_names, write_record
from ulmfit_tools.sampling import EpochLengthGroupedSampler, LongestFirstSampler, evaluation_order, row_lengths
from ulmfit_tools.schedules import SCHEDULES, get_schedule
from ulmfit_tools.training_args import ULMFiTTrainingArguments

__all__ = ["TrainingInterrupted", "ULMFiTTrainer", "ULMFiTTrainingArguments", "optimizer_of_arguments"]

logger = logging.getLogger(__name__)


class ULMFiTTrainer(Trainer):
    """A `Trainer` whose layers have their own rates and whose runs can be stopped anywhere and go on exactly.

    It takes what `Trainer` takes and does what `Trainer` does; other than there,

    - the optimizer has a group with its own rate for each layer group, and holds frozen parameters too, so layers
      that are thawed later train; passing `optimizers` or `optimizer_cls_and_kwargs` replaces it, and
      `optimizer_of_arguments(args, trainable_only=True)` gives one for a run in which nothing is thawed;
    - the schedule can be any of `ulmfit_tools.schedules.SCHEDULES`;
    - `train_sampling_strategy="group_by_length"` gives every epoch an order that depends on nothing but the seed and
      the epoch, and evaluates the longest texts first; `compute_metrics` and `predict` still have the rows in their
      own order (with `eval_do_concat_batches=False`, `batch_eval_metrics` or `dataloader_drop_last` none is sorted);
    - checkpoints are written whole, and resuming takes the last one that is good;
    - a run that starts afresh moves the checkpoints that are in its folder into `_earlier-run-1` there, and says so;
    - accumulated batches are averaged, where Trainer adds the gradients of most classifiers up;
    - the column `labels` is kept also for models whose forward does not name it (Qwen3.5);
    - on SIGTERM the run writes a checkpoint after the step and raises `TrainingInterrupted`.

    With FSDP, DeepSpeed or XLA, which write a checkpoint from many processes in their own ways, checkpoints are
    those of `Trainer`.

    Args:
        model: The model to train.
        args: The settings.
        **settings: Everything else that `Trainer` takes.

    Raises:
        InputError: `args` are not `ULMFiTTrainingArguments`.
    """

    args: ULMFiTTrainingArguments
    model: nn.Module
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: ULMFiTTrainingArguments | None = None,
        **settings: Any,
    ) -> None:
        if args is not None and not isinstance(args, ULMFiTTrainingArguments):
            raise InputError(f"ULMFiTTrainer takes ULMFiTTrainingArguments. Received: args={type(args).__name__}")
        self._staging_root: str | None = None
        self._steps_per_epoch = 0
        super().__init__(model, args or ULMFiTTrainingArguments("tmp_trainer"), **settings)
        if self.args.label_names is None and not self.label_names:
            self.label_names = ["labels"]  # some forwards have them among **kwargs, where Trainer does not find them
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and loss_counts_items(self.model)
        self._passed_optimizer = self.optimizer
        self._keeper = RunKeeper(self)
        self.add_callback(self._keeper)

    # Optimizer and schedule

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make the optimizer with a rate for each layer group, unless one was passed or is there already.

        Raises:
            CheckpointError: The run is resumed and the checkpoint's optimizer state belongs to other parameters.
        """
        if self.optimizer is not None and not self._saves_sharded:
            self._check_optimizer_covers()
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            self.optimizer_cls_and_kwargs = optimizer_of_arguments(self.args)
            try:
                super().create_optimizer(model)
            finally:
                self.optimizer_cls_and_kwargs = None
        else:
            super().create_optimizer(model)
        self._keeper.check_optimizer(parameter_names(self.model, self.optimizer))
        return self.optimizer

    def _check_optimizer_covers(self) -> None:
        """Layers may have been thawed since the optimizer was made; `Trainer` would use it as it is, without them."""
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        trained = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        missing = [name for name, parameter in trained if id(parameter) not in held]
        if missing and self._passed_optimizer is None:
            self.optimizer = None
        elif missing:
            logger.warning(
                f"{len(missing)} trainable parameters are not in the optimizer that was passed and will not train, the"
                f" first of them {missing[0]}."
            )

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Make the schedule that `lr_scheduler_type` names, unless one was passed.

        Raises:
            CheckpointError: The run is resumed and the checkpoint is of a run with another schedule.
        """
        name = self.args.schedule_name
        self._keeper.check_schedule(name)
        if self.lr_scheduler is None and name in SCHEDULES:
            if not self._steps_per_epoch:
                self.set_initial_training_values(self.args, self.get_train_dataloader())
            self.lr_scheduler = get_schedule(
                name,
                self.optimizer if optimizer is None else optimizer,
                num_training_steps=num_training_steps,
                steps_per_epoch=self._steps_per_epoch,
                **self.args.schedule_settings,
            )
            self._created_lr_scheduler = True  # so that another `train()` makes a new one
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_learning_rate(self) -> float:
        """The rate in the logs is the head's, which `learning_rate` names; Trainer's is the first group's."""
        if self.is_deepspeed_enabled:
            return super()._get_learning_rate()
        return float(self.optimizer.param_groups[-1]["lr"])

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple:
        """Trainer's numbers of steps and epochs; the steps of an epoch are kept for schedules that count epochs."""
        values = super().set_initial_training_values(args, dataloader)
        self._steps_per_epoch = values[1]
        return values

    # The order of the rows

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or dataset is None or not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        split = self.accelerator.split_batches
        together = self._train_batch_size * (1 if split else self.args.world_size)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        lengths = row_lengths(dataset, self._counted_column, length_column=self.args.length_column_name)
        return EpochLengthGroupedSampler(lengths, together, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length" or not has_length(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        args = self.args
        if args.batch_eval_metrics or not args.eval_do_concat_batches or args.dataloader_drop_last:
            return SequentialSampler(eval_dataset)  # someone sees which rows are in which batch
        return LongestFirstSampler(row_lengths(eval_dataset, self._counted_column))

    @property
    def _counted_column(self) -> str:
        return getattr(self.processing_class, "model_input_names", ["input_ids"])[0]

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's data loader; with several processes its epoch also reaches the sampler in a resumed epoch."""
        dataloader: Any = super().get_train_dataloader()
        dealt_out: Any = getattr(getattr(dataloader, "batch_sampler", None), "batch_sampler", None)
        if hasattr(dealt_out, "sampler"):  # Accelerate looks for it one level up, but puts only its own there
            dataloader.set_sampler(dealt_out.sampler)
        return dataloader

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As Trainer's; what goes to `compute_metrics` and to who calls it is in the dataset's own order."""
        order, given = evaluation_order(dataloader), self.compute_metrics
        if order is None:
            return super().evaluation_loop(dataloader, *args, **kwargs)

        def compute_metrics(found: EvalPrediction) -> dict[str, float]:
            assert given is not None
            return given(
                EvalPrediction(*_in_order(order, found.predictions, found.label_ids, found.inputs, found.losses))
            )

        self.compute_metrics = given and compute_metrics
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self.compute_metrics = given
        predictions, label_ids = _in_order(order, output.predictions, output.label_ids)
        return output._replace(predictions=predictions, label_ids=label_ids)

    # Training, stopped and resumed

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, or go on training.

        Nothing of another run is deleted or taken for this one's: where there are checkpoints in `output_dir` and
        none of them is resumed, they are moved into a folder `_earlier-run-1` in it, from which that run can go on.

        Args:
            resume_from_checkpoint: True goes on from the last good checkpoint in `output_dir` and names the later
                ones that it passes over; a path goes on from that checkpoint.
            trial: As in `Trainer`.
            ignore_keys_for_eval: As in `Trainer`.

        Raises:
            CheckpointError: There is no good checkpoint, the given one is damaged or belongs to another run, or the
                disk is full.
            TrainingInterrupted: The process got SIGTERM; the checkpoint is written.
        """
        checkpoint = None if self._saves_sharded else self._checkpoint_to_resume(resume_from_checkpoint, trial)
        resume: Any = resume_from_checkpoint if self._saves_sharded else checkpoint and str(checkpoint)
        self._keeper.begin(checkpoint)
        self.remove_callback(self._keeper)
        self.add_callback(self._keeper)  # last again, after any that were added since
        eval_on_start = self.args.eval_on_start
        self.args.eval_on_start = eval_on_start and not resume  # a resumed run had its own already
        try:
            with self._keeper.listening():
                output = super().train(resume, trial, ignore_keys_for_eval)
        finally:
            self.args.eval_on_start = eval_on_start
            self._keeper.begin(None)
            undo_unfreezing(self.model)  # of a run that was interrupted: callbacks are told of no exception
        return output._replace(training_loss=output.metrics["train_loss"])

    def _checkpoint_to_resume(self, resume: str | os.PathLike | bool | None, trial: Any) -> Path | None:
        """Look once, in the main process: all must go on from the same checkpoint, and reading it takes a while."""
        found: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                found[0] = _choose_checkpoint(resume, str(self.args.output_dir))
                _make_room(Path(self._get_output_dir(trial)), found[0])
            except CheckpointError as error:
                found[1] = error
        broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        return found[0]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # it is set already where the resumed run had come to its end
            super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; the mean loss at the end is that of the whole run, also of a resumed one."""
        if self._keeper.record is not None and "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, start_time)

    def load_weights(self, folder: str | os.PathLike) -> None:
        """Put the weights of a checkpoint or a saved model, adapters included, into the model."""
        self._load_from_checkpoint(str(folder))

    # Whole checkpoints

    @property
    def _saves_sharded(self) -> bool:
        return (
            self.is_deepspeed_enabled
            or self.is_fsdp_enabled
            or self.is_distributed_loading_by_transformers
            or is_torch_xla_available()
            or is_sagemaker_mp_enabled()
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Have `Trainer` write its checkpoint into a staging folder, and put that into its place when all is there."""
        if self._saves_sharded:
            super()._save_checkpoint(model, trial)
            return
        target = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        staging = checkpoints.staging_folder(target)
        record = self._keeper.to_record(self.control, self.state)
        writes = self.args.should_save
        with checkpoints.whole_folder(target, expected_bytes=self._state_bytes()) if writes else nullcontext():
            self.accelerator.wait_for_everyone()
            self._staging_root = str(staging.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging_root = None
            if self.state.best_model_checkpoint == str(staging):
                self.state.best_model_checkpoint = str(target)
            if writes:
                self.state.save_to_json(str(staging / "trainer_state.json"))
                write_record(staging, record)
            self.accelerator.wait_for_everyone()
        if writes:
            best = self.state.best_model_checkpoint
            checkpoints.rotate_checkpoints(target.parent, self.args.save_total_limit, newest=target, best=best)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging_root or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging_root is None:  # the upload goes on in the background: not from a folder about to be renamed
            super()._push_from_checkpoint(checkpoint_folder)

    def _state_bytes(self) -> int:
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        tensors = [value for value in state if isinstance(value, torch.Tensor)]
        return sum(tensor.nbytes for tensor in [*self.model.parameters(), *tensors])


def optimizer_of_arguments(
    args: ULMFiTTrainingArguments, *, trainable_only: bool = False
) -> tuple[Any, dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes, with the layer groups' rates that the arguments say.

    Args:
        args: The settings.
        trainable_only: Leave frozen parameters out, for a run in which nothing is thawed.
    """
    return discriminative_optimizer(
        args,
        factor=args.discriminative_factor,
        num_groups=args.num_layer_groups,
        learning_rate=learning_rate_setting(args),
        trainable_only=trainable_only,
    )


def check_optimizer(args: ULMFiTTrainingArguments, num_groups: int) -> None:
    """Check, before anything is built, that the arguments' optimizer and rates fit a model of so many layer groups.

    Raises:
        InputError: They do not.
    """
    optimizer_of_arguments(args)
    count = num_groups if args.num_layer_groups is None else args.num_layer_groups
    if not 1 <= count <= num_groups:
        raise InputError(f"The model has {num_groups} layer groups. Received: num_layer_groups={count}")
    group_learning_rates(count, learning_rate_setting(args), factor=args.discriminative_factor)


def try_arguments(model: nn.Module, args: ULMFiTTrainingArguments) -> None:
    """Let transformers, Accelerate and the optimizer refuse what they refuse before anything is trained or written.

    Raises:
        InputError: They do; in their words.
    """
    idle: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    with TemporaryDirectory() as elsewhere:
        try:
            ULMFiTTrainer(model, dataclasses.replace(args, output_dir=elsewhere, **idle)).create_optimizer()
        except (ValueError, RuntimeError, ImportError) as error:
            raise InputError(f"Training arguments: {' '.join(str(error).split())}") from error


def learning_rate_setting(args: ULMFiTTrainingArguments) -> Any:
    """The rate, the span or the rates of the layer groups, as `param_groups.group_learning_rates` takes them."""
    span = None if args.learning_rate_low is None else (args.learning_rate_low, args.learning_rate)
    return args.group_learning_rates or span or args.learning_rate


def _choose_checkpoint(resume: str | os.PathLike | bool | None, folder: str) -> Path | None:
    checkpoints.clean_up(folder)
    if resume is None or resume is False:
        return None
    if resume is True:
        chosen, skipped = checkpoints.last_good_checkpoint(folder)
        if chosen is None:
            passed = "; ".join(f"{path.name}: {reason}" for path, reason in skipped)
            raise NoGoodCheckpoint(f"There is no whole checkpoint in {folder} to resume from. {passed}".rstrip())
        for path, reason in skipped:
            logger.warning(f"Passed over {path}: {reason}.")
    else:
        chosen = Path(resume)
        if problems := checkpoints.resume_problems(chosen):
            good, _ = checkpoints.last_good_checkpoint(folder)
            other = "" if good is None else f" The last good checkpoint of this run is {good}."
            raise CheckpointError(f"Cannot resume from {chosen}: {'; '.join(problems)}.{other}")
    if not (chosen / checkpoints.MANIFEST).exists():
        logger.warning(f"{chosen} has no manifest (another Trainer wrote it); its content was not checked to the bit.")
    return chosen


def _make_room(folder: Path, resumed: Path | None) -> None:
    """Set another run's checkpoints aside, and say where they are."""
    if resumed is not None and resumed.parent.resolve() == folder.resolve():
        return
    aside = checkpoints.set_aside_run(folder)
    if aside is not None:
        logger.warning(
            f"{folder} held checkpoints of another run, which are in {aside.name} there now. To go on with that run,"
            f' give output_dir="{aside}" and resume_from_checkpoint=True.'
        )


def _in_order(order: list[int], *evaluated: Any) -> list[Any]:
    """What an evaluation in some order found, in the order of the dataset."""
    back = np.argsort(order)
    return [_take(values, back) for values in evaluated]


def _take(values: Any, rows: np.ndarray) -> Any:
    """Rows of an array, or of each array in a tuple or a dictionary of them; one of fewer rows is about batches."""
    if isinstance(values, (tuple, list)):
        return type(values)(_take(value, rows) for value in values)
    if isinstance(values, dict):
        return {name: _take(value, rows) for name, value in values.items()}
    return values if values is None or len(values) < len(rows) else values[rows]
