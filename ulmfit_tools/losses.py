"""What the loss of a model is a mean over: its own batch, or all batches of an update."""

import inspect
import re
from typing import Any

from torch import nn


def loss_counts_items(model: nn.Module) -> bool:
    """Whether a model divides its loss by the number of items in all batches of an update, when it is told the number.

    Trainer takes it from a `**kwargs` in the signature, and then does not average over the batches of an update or
    over processes. All of transformers' sequence classifiers have it, all but one ignore the number and return the
    mean over their batch: with 4 accumulated batches, loss and gradients are 4 times too large. A wrong "no" does no
    harm: means over batches are averaged, as for a model without `**kwargs`.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()  # under PEFT
    forward = inspect.unwrap(type(base).forward)
    if hasattr(base, "accepts_loss_kwargs") or "num_items_in_batch" in inspect.signature(forward).parameters:
        return True
    try:
        return re.search(r"self\.loss_function\([^()]*\*\*", inspect.getsource(forward)) is not None
    except OSError:  # a class typed into a console has no source
        return False
