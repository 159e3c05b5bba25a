"""Callbacks for one plain `Trainer` run: gradual unfreezing, the rates in the logs, an end at overfitting.

None of them keeps a state that a checkpoint would have to carry: what they do follows from the training state.
"""

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ulmfit_tools.errors import InputError
from ulmfit_tools.evaluations import Cycles, best_step, check_metric, has_overfit
from ulmfit_tools.gradual_unfreezing import GradualUnfreezing

__all__ = ["GradualUnfreezing", "LogGroupRates", "StopWhenOverfit", "best_step", "group_rates", "has_overfit"]


class LogGroupRates(TrainerCallback):
    """Adds the rate of each optimizer group to the training logs, as `lr/<name of the group>`.

    It is the rate of the step that was just taken, warm-up of thawed groups included; 0 for a group that is frozen.
    They reach `state.log_history` and the callbacks that come after this one. Trainer puts those of `report_to` first,
    so for them add it at the front: `trainer.callback_handler.callbacks.insert(0, LogGroupRates())`.
    """

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}
        self._hook: Any = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begins to read the rates where they are final: inside the optimizer's step."""
        self.on_train_end(args, state, control)  # where an earlier `train()` raised
        self._hook = getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(self._read)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Adds them to the logs of training steps."""
        if "loss" in logs:
            rates = {f"lr/{name}": rate for name, rate in self._rates.items()}
            logs.update(rates)
            state.log_history[-1].update(rates)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops to read."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _read(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._rates = group_rates(optimizer)


class StopWhenOverfit(TrainerCallback):
    """Ends the training when the validation loss has turned up; see `has_overfit`.

    With `load_best_model_at_end` the model ends with its best weights, as in the last of the fast.ai steps. Trainer
    takes one more step when it is resumed from the checkpoint at which it stopped; ask `has_overfit` before resuming.

    Args:
        patience: How many evaluations in a row without an improvement end the training.
        min_delta: A smaller change than this is no improvement, in units of the metric.
        metric: The name of the metric, with or without Trainer's `eval_`.
        greater_is_better: Whether the metric improves upwards.
        cycles: Under a schedule with warm restarts: its cycles. Only the evaluations at their ends are counted, and
            `patience` counts cycles.

    Raises:
        InputError: `patience` is below 1 or `min_delta` below 0; in training, when nothing is evaluated.
    """

    def __init__(
        self,
        patience: int = 1,
        min_delta: float = 0.0,
        metric: str = "eval_loss",
        greater_is_better: bool = False,
        cycles: Cycles | None = None,
    ):
        if patience < 1 or min_delta < 0:
            raise InputError(
                f"patience is at least 1, min_delta at least 0. Received: patience={patience}, min_delta={min_delta}"
            )
        self.patience = patience
        self.min_delta = min_delta
        self.metric = metric
        self.greater_is_better = greater_is_better
        self.cycles = cycles

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses a run without evaluations; ends one at once that had already overfit when it was saved."""
        if args.eval_strategy == "no":
            raise InputError('StopWhenOverfit needs evaluations. Received: eval_strategy="no"')
        self._decide(state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the training when this evaluation was one too many."""
        self._decide(state, control)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses a metric that the last evaluations did not have."""
        if state.log_history and any(key.startswith("eval_") for key in state.log_history[-1]):
            check_metric(state.log_history, self.metric)

    def has_overfit(self, state: TrainerState) -> bool:
        """Whether the run has, by the evaluations in its state."""
        return has_overfit(
            state.log_history,
            patience=self.patience,
            min_delta=self.min_delta,
            metric=self.metric,
            greater_is_better=self.greater_is_better,
            cycles=self.cycles,
        )

    def _decide(self, state: TrainerState, control: TrainerControl) -> None:
        if self.has_overfit(state):
            control.should_training_stop = True


def group_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rate of each optimizer group by its name, or its number where it has none; 0 where it is frozen."""
    rates: dict[str, float] = {}
    for number, group in enumerate(optimizer.param_groups):
        trains = any(parameter.requires_grad for parameter in group["params"])
        name = str(group.get("name", number))
        rates[name] = max(rates.get(name, 0.0), float(group["lr"]) if trains else 0.0)
    return rates
