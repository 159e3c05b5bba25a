"""What ends a phase before its time: a loss that is no number any more, or a metric that the evaluations lack."""

import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ulmfit_tools.errors import InputError, nearest
from ulmfit_tools.plans.results import clean_metrics


class PhaseWatch(TrainerCallback):
    """Ends the run where going on would waste its time.

    Args:
        phase: The phase's name.
        best_by: The metric by which this phase or another one keeps its best weights; None where none does.
    """

    def __init__(self, phase: str, best_by: str | None) -> None:
        self.phase, self.best_by = phase, best_by

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Look at the weights where the gradients are no numbers; with fp16 that alone is an update passed over."""
        if math.isnan(logs.get("grad_norm", 0.0)) and not _has_best(args, state) and not are_finite(kwargs["model"]):
            raise diverged(self.phase, args, state, "the gradients are nan")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Look at the validation loss and for the metric; what is evaluated at the end of a run is called `test_`."""
        if "eval_loss" not in metrics:
            return
        if math.isnan(metrics["eval_loss"]) and not _has_best(args, state):
            raise diverged(self.phase, args, state, "the validation loss is nan")
        found = clean_metrics(metrics)
        if self.best_by is not None and self.best_by.removeprefix("eval_") not in found:
            raise InputError(
                f"The metrics lack '{self.best_by}', by which the plan keeps the best weights; there are "
                f"{', '.join(found)}.{nearest(self.best_by, found)} Set metric_for_best_model to one of these (of the "
                "loss the lowest is the best, of the others the highest) and start anew with --overwrite"
            )


def _has_best(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether there are weights to go back to."""
    return args.load_best_model_at_end and state.best_metric is not None


def are_finite(model: nn.Module) -> bool:
    """Whether all weights that train are numbers."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return all(bool(torch.isfinite(parameter).all()) for parameter in trained)


def diverged(phase: str, args: TrainingArguments, state: TrainerState, how: str) -> InputError:
    """The error that ends a run whose weights are worthless."""
    precision = ", or with bf16 or full precision: fp16 overflows" if args.fp16 else ""
    return InputError(
        f"Phase '{phase}' has diverged: {how} at step {state.global_step}, and its weights are worthless. Start anew "
        f"(--overwrite) with a lower learning rate{precision}. Received: learning_rate={args.learning_rate:g}"
    )
