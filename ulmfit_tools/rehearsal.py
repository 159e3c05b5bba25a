"""A rehearsal: a short run of a trainer's own training at other rates, with the loss of every step noted."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ulmfit_tools.errors import InputError
from ulmfit_tools.layers import layer_groups
from ulmfit_tools.restoring import own_random_numbers


class LossNotes(TrainerCallback):
    """Notes the loss before the first update and after each one, and ends the run where it tells no more.

    Args:
        rates: The head's rate at each update.
        eval_batches: How many batches of the evaluation set the loss is taken on; 0 for the training batches.
        stops: Whether these losses, the first of them from before any update, say that the run should end.
        on_step: Called after each step, to show how far it is.
    """

    def __init__(
        self,
        rates: Sequence[float],
        eval_batches: int,
        stops: Callable[[Sequence[float]], bool],
        on_step: Callable[[], object],
    ) -> None:
        self.rates = rates
        self.eval_batches = eval_batches
        self.stops = stops
        self.on_step = on_step
        self.losses: list[float] = []
        self.updates = 0
        self.stopped = "end"
        self.training_steps = 0
        self.rate_norm = 1.0
        self.width: int | None = None
        self.label_entropy: float | None = None
        self.batch_size: int | None = None

    def attach(self, trainer: Trainer, planned: TrainingArguments) -> None:
        """Watch a trainer, which then has a `training_step` of its own; `planned` is what it stands in for."""
        self._trainer = trainer
        self._planned = planned
        self._train_losses: list[torch.Tensor] = []
        self._rows = 0
        self._labels: Any = None
        self._classes_met: list[torch.Tensor] = []
        self._is_mean: bool | None = None
        trainer_step = trainer.training_step

        def training_step(model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            self._rows += find_batch_size(inputs) or 0
            self._labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
            batches = trainer.current_gradient_accumulation_steps
            # Where it is told how many items an update has, a plain Trainer takes every loss for a share of the
            # update's, also the mean of a batch; unless it is told which of them it is.
            if self._is_mean is None and batches > 1:
                taken_for_share = num_items_in_batch is not None and trainer.loss_is_scaled_for_ga is None
                self._is_mean = taken_for_share and not _is_share(trainer, model, inputs, num_items_in_batch)
            loss = trainer_step(model, inputs, num_items_in_batch)
            self._train_losses.append(loss / batches if self._is_mean else loss)
            return loss

        trainer.training_step = training_step  # type: ignore[method-assign]

    def on_forward(self, model: nn.Module, args: Any, outputs: Any) -> None:
        """A forward hook of the model: keeps the labels of a batch, where each row's is one of the logits' classes."""
        labels = self._labels
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
        if isinstance(logits, tuple):  # of a loss, where there is one, and logits
            logits = next((value for value in logits if isinstance(value, torch.Tensor) and value.dim() == 2), None)
        if not isinstance(labels, torch.Tensor) or not isinstance(logits, torch.Tensor):
            return
        if labels.dim() == 1 and not labels.is_floating_point() and logits.dim() == 2 and logits.shape[-1] > 1:
            self._classes_met.append(labels[labels >= 0].cpu())
            self._labels = None  # a batch counts once, however often the model sees it

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Counts the steps of the planned training, and takes the evaluation loss before any update."""
        values = self._trainer.set_initial_training_values(self._planned, train_dataloader)
        self.training_steps = values[-1]
        if self.training_steps < 1:
            raise InputError(
                "The range test looks for the rate of a training, and this one has no steps: raise num_train_epochs"
                f" or max_steps. Received: num_train_epochs={self._planned.num_train_epochs}, "
                f"max_steps={self._planned.max_steps}"
            )
        if self.eval_batches:
            self._batches = list(self._trainer.get_eval_dataloader(self._evaluated_rows(args)))
            if not self._batches:
                raise InputError(
                    f"The evaluation set has not one whole batch of {args.eval_batch_size}, and "
                    "dataloader_drop_last leaves parts out: use smaller batches, or leave eval_batches out"
                )
            self._note(self._evaluate(model), control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Takes the loss that goes with the step: the training batches saw the weights as they were before it."""
        self.on_step()
        training_loss, self._train_losses = torch.stack(self._train_losses).sum(), []
        if self.batch_size is None:  # as the loader deals them out, whatever the arguments say
            self.batch_size = self._rows * args.world_size or None
        if not self.eval_batches and len(self.losses) == self.updates:
            self._note(training_loss, control)
        if self._trainer.accelerator.optimizer_step_was_skipped:  # gradients in half precision were too large
            return
        self.updates += 1
        if self.eval_batches:
            self._note(self._evaluate(model), control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The entropy of the labels that all processes met."""
        if self._classes_met:
            counts = torch.bincount(torch.cat(gather_object(self._classes_met)))
            self.label_entropy = torch.special.entr(counts / counts.sum()).sum().item()

    def _evaluated_rows(self, args: TrainingArguments) -> Any:
        """Rows from all over the evaluation set, in which similar ones may stand together."""
        dataset: Any = self._trainer.eval_dataset
        rows = min(len(dataset), self.eval_batches * args.eval_batch_size * args.world_size)
        chosen = [index * len(dataset) // rows for index in range(rows)]
        return dataset.select(chosen) if hasattr(dataset, "select") else Subset(dataset, chosen)

    def _evaluate(self, model: nn.Module) -> torch.Tensor:
        model.eval()
        optimizer: Any = self._trainer.optimizer
        if callable(getattr(optimizer, "eval", None)):  # a schedule-free one; the next training step undoes it
            optimizer.eval()
        step: Any = self._trainer.prediction_step
        losses = [step(model, batch, prediction_loss_only=True)[0] for batch in self._batches]
        if any(loss is None for loss in losses):
            raise InputError("The evaluation set gives no loss, as it has no labels: leave eval_batches out")
        return torch.stack(losses).mean()

    def _note(self, loss: torch.Tensor, control: TrainerControl) -> None:
        value = self._trainer.accelerator.reduce(loss.detach().float(), reduction="mean").item()
        if not math.isfinite(value):
            if not self.losses:
                raise InputError(
                    "The loss is not a number before the first update, which no rate can mend: look at the labels, "
                    f"the inputs and the precision. Received: loss={value}"
                )
            self.stopped, control.should_training_stop = "nan", True
            return
        self.losses.append(value)
        if self.stops(self.losses):
            self.stopped, control.should_training_stop = "diverged", True


def _is_share(trainer: Trainer, model: nn.Module, inputs: Any, items: Any) -> bool:
    """Whether the loss of a batch is divided by the number of items in all batches of its update.

    No signature tells: classifiers of transformers, and many an overridden `compute_loss`, take the number and leave
    it. So the batch is looked at twice, with the number and with its double.
    """
    losses = []
    for number in (items, 2 * items):
        batch = trainer._prepare_inputs(dict(inputs))  # a loss may take the labels out of it
        with own_random_numbers(trainer.args.device), torch.no_grad(), trainer.compute_loss_context_manager():
            loss: Any = trainer.compute_loss(model, batch, num_items_in_batch=number)
        losses.append(abs(loss.mean().item()))
    return losses[1] < 0.75 * losses[0]


def rehearse(trainer: Trainer, optimizer: Optimizer | None, notes: LossNotes, order: int = 0) -> LossNotes:
    """Train a shallow copy of a trainer, at the rates of the notes and in all else as the trainer would.

    It shares the model and the data; what it does to them is for the caller to put back (`restoring.unchanged`). The
    trainer itself, its callbacks, its `Accelerator` with the loss scale and its folder have no part in it.

    Args:
        trainer: The trainer.
        optimizer: The one to use, if it has one already.
        notes: They begin empty.
        order: 0 takes the batches in the trainer's own order; other numbers each take another one, where it is drawn
            from the trainer's seed or, as a stream of `datasets` does, from the epoch.

    Returns:
        The notes.
    """
    rehearsal: Any = copy.copy(trainer)
    for name, value in vars(trainer).items():  # a method that was put onto the trainer itself is bound to it
        if isinstance(value, MethodType) and value.__self__ is trainer:
            setattr(rehearsal, name, MethodType(value.__func__, rehearsal))
    rehearsal.args = _quiet(trainer.args, len(notes.rates))
    if order:
        seed = trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed
        rehearsal.args.data_seed = seed + order
        _shift_epochs(rehearsal, order)
    rehearsal.create_accelerator_and_postprocess()  # with its own loss scale and lists of what it prepared
    rehearsal.optimizer_cls_and_kwargs = _own_groups(trainer.optimizer_cls_and_kwargs)
    # Private to Trainer, which with workers that stay would take the loader of the last `evaluate` for any other rows.
    rehearsal._eval_dataloaders = {}
    rehearsal.model_init = None  # it would be called again, for the weights that are there already
    rehearsal.optimizer, rehearsal.lr_scheduler = optimizer, None
    rehearsal.control = TrainerControl()
    rehearsal.callback_handler = CallbackHandler(
        [DefaultFlowCallback, notes], trainer.model, trainer.processing_class, None, None
    )

    def create_scheduler(num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        swept: Any = rehearsal.optimizer if optimizer is None else optimizer
        head, last = head_rate(trainer, swept), len(notes.rates) - 1
        notes.rate_norm, notes.width = rate_norm(trainer, swept, head), trained_width(trainer, swept)
        rehearsal.lr_scheduler = LambdaLR(swept, lambda step: notes.rates[min(step, last)] / head)
        return rehearsal.lr_scheduler

    # On the copy alone, and before its class's own methods, whatever that class is.
    rehearsal.create_scheduler = create_scheduler
    # What is worked out for a log alone is left out: gradients are measured only where they are clipped.
    rehearsal.log = lambda logs, start_time=None: None
    rehearsal.floating_point_ops = lambda inputs: 0
    rehearsal._get_grad_norm = lambda model, grad_norm=None: grad_norm
    notes.attach(rehearsal, trainer.args)
    model: Any = trainer.model
    hook = model.register_forward_hook(notes.on_forward)
    try:
        Trainer.train(rehearsal)  # a subclass's own `train` looks after signals and checkpoints
    finally:
        hook.remove()
        vars(rehearsal).clear()  # the copy's functions hold the copy; what else goes in circles, `train` collects
    return notes


def _shift_epochs(rehearsal: Any, by: int) -> None:
    """Let a trainer's loader take its epochs for later ones."""
    get_loader = rehearsal.get_train_dataloader

    def get_train_dataloader() -> Any:
        loader = get_loader()
        if hasattr(loader, "set_epoch"):
            set_epoch = loader.set_epoch
            loader.set_epoch = lambda epoch: set_epoch(epoch + by)
        return loader

    rehearsal.get_train_dataloader = get_train_dataloader


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """An optimizer without what Accelerate puts around it."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def list_parameters(trainer: Trainer) -> None:
    """Put lists into the place of iterators in a trainer's `optimizer_cls_and_kwargs`, for more than one optimizer.

    An iterator as `model.parameters()` serves once: the next optimizer would train nothing.
    """
    settings = trainer.optimizer_cls_and_kwargs[1] if trainer.optimizer_cls_and_kwargs else {}
    if isinstance(settings.get("params"), Iterator):
        settings["params"] = list(settings["params"])
    for group in settings.get("params", []):
        if isinstance(group, dict) and isinstance(group.get("params"), Iterator):
            group["params"] = list(group["params"])


def _own_groups(given: tuple[type[Optimizer], dict[str, Any]] | None) -> tuple[type[Optimizer], dict[str, Any]] | None:
    """An optimizer's class and settings with parameter groups that may be used up and changed; the given ones stay.

    `Trainer` takes `params` out of the dictionary, and the optimizer and its schedule write into the groups.
    """
    if given is None:
        return None
    cls, own = given[0], dict(given[1])
    if "params" in own:
        own["params"] = [dict(group) if isinstance(group, dict) else group for group in own["params"]]
    return cls, own


def _quiet(args: TrainingArguments, num_steps: int) -> TrainingArguments:
    """The same arguments for so many steps in which nothing is logged, evaluated, saved or pushed."""
    quiet = copy.copy(args)  # as it stands: its checks and what they derive have had their turn
    quiet.max_steps = num_steps
    quiet.eval_strategy = quiet.logging_strategy = IntervalStrategy.NO
    quiet.save_strategy = SaveStrategy.NO
    quiet.logging_first_step = quiet.eval_on_start = quiet.load_best_model_at_end = quiet.push_to_hub = False
    quiet.logging_nan_inf_filter = False  # the notes look at every loss anyway
    quiet.auto_find_batch_size = False  # it begins again in the middle, with weights that have seen high rates
    accelerator: Any = copy.deepcopy(args.accelerator_config)
    if accelerator.gradient_accumulation_kwargs:  # into which Trainer has put a number that it would then refuse
        accelerator.gradient_accumulation_kwargs.pop("num_steps", None)
    quiet.accelerator_config = accelerator
    return quiet


def head_rate(trainer: Trainer, optimizer: Optimizer) -> float:
    """The rate that `learning_rate` names, before any schedule: that of the last layer group.

    Where the optimizer holds no parameter of that group, it is what the training arguments say.

    Raises:
        InputError: It is 0, and no multiple of 0 is a rate to be found; or the optimizer changes nothing that trains.
    """
    model: Any = trainer.model
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not any(id(parameter) in trained for group in optimizer.param_groups for parameter in group["params"]):
        raise InputError(
            "The optimizer holds no parameter of the model that is trainable now, so no rate changes anything: pass "
            f"another, or none. Received: {len(trained)} trainable parameters, none of them in the optimizer"
        )
    head = {id(parameter) for parameter in layer_groups(model)[-1].parameters(model)}
    rates = [
        group.get("initial_lr", group["lr"])
        for group in optimizer.param_groups
        if any(id(parameter) in head for parameter in group["params"])
    ]
    if None in rates:
        raise InputError(
            "The optimizer sets its own rates (lr=None), so there is none to look for: give it one, with "
            "relative_step=False for Adafactor"
        )
    rate = float(max(rates, default=trainer.args.learning_rate))
    if not rate > 0:
        raise InputError(f"The range test multiplies the trainer's rates, so they must not be 0. Received: {rate}")
    return rate


def rate_norm(trainer: Trainer, optimizer: Optimizer, head: float) -> float:
    """The root of the sum of squares, over the layer groups that train, of the rate as a share of the head's.

    A parameter's rate is that of its optimizer group; where a layer group has several, the highest counts.
    """
    model: Any = trainer.model
    rates = {
        id(parameter): float(group.get("initial_lr", group["lr"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    shares = []
    for group in layer_groups(model):
        own = [rates[id(p)] for p in group.parameters(model) if p.requires_grad and id(p) in rates]
        shares += [max(own) / head] if own else []
    return math.hypot(*shares) if shares else 1.0


def trained_width(trainer: Trainer, optimizer: Optimizer) -> int | None:
    """The hidden size, where whole layer groups besides the head train, with a kind of Adam; else None.

    Good rates of adapters, of a head alone and of other optimizers lie elsewhere, whatever the width. Groups are whole
    where most of their numbers train: some models have fixed ones, as a table of positions.
    """
    model: Any = trainer.model
    groups = [list(group.parameters(model)) for group in layer_groups(model)]
    trained = [group for group in groups if any(parameter.requires_grad for parameter in group)]
    numbers = [parameter.numel() * (1 if parameter.requires_grad else -1) for group in trained for parameter in group]
    if len(trained) < 2 or sum(numbers) < 0 or "adam" not in type(unwrapped(optimizer)).__name__.lower():
        return None
    config: Any = getattr(model, "config", None)
    return None if config is None else getattr(config.get_text_config(), "hidden_size", None)
