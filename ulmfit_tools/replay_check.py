"""Whether a model gives the same numbers from the activations of its frozen part, and what of them it reads."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ulmfit_tools.freeze_boundary import Batch, Boundary, CannotPrecompute, Replay, capturing
from ulmfit_tools.restoring import own_random_numbers

# Of the largest value: sums in another order differ by far less, another input by far more.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
NOISE = 1e-2  # of that, and of the largest gradient: that of a key's bias is 0 but for the order of additions


def check_replay(
    replay: Replay,
    batch: Batch,
    cached: torch.Tensor,
    replay_batch: Batch | None = None,
    loss: Callable[[Batch], torch.Tensor] = lambda batch: torch.zeros(()),
) -> None:
    """Compare logits, loss and gradients of the layers themselves with those of the replay, in eval mode.

    Args:
        replay: The replay, not installed; it knows the form of the outputs.
        batch: The model's inputs without labels.
        cached: What left the boundary for these rows in other batches, put together as the replay gets it.
        replay_batch: The inputs for the replay, where they are others.
        loss: The training's loss for such a batch, a scalar: it may read more than the logits.

    Raises:
        CannotPrecompute: They differ.
    """
    model = replay.model
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with in_eval_mode(model):
        with tried(model, "gives no loss for a few rows in eval mode"):
            direct = _numbers(model, batch, parameters, loss)
        with tried(model, "does not run from activations"), replay.installed():
            replay.activations = cached
            replayed = _numbers(model, batch if replay_batch is None else replay_batch, parameters, loss)
    known = [values for values in direct if values is not None]
    noise = NOISE * TOLERANCE[direct[0].dtype] * max((float(values.abs().max()) for values in known), default=0.0)
    for ours, theirs in zip(replayed, direct, strict=True):
        if (ours is None) != (theirs is None) or (theirs is not None and _differ(ours, theirs, noise)):
            raise CannotPrecompute(
                f"{type(model).__name__} gives other numbers from activations at {replay.boundary.path}: its layers "
                "hand on more than these, or something else where a batch is padded otherwise, or the loss reads more"
            )


@contextmanager
def tried(model: nn.Module, failure: str) -> Iterator[None]:
    """A trial of a model; whatever it makes of one that does not suit it, the training does without activations.

    Raises:
        CannotPrecompute: It fails; the message says of what.
    """
    try:
        yield
    except CannotPrecompute:
        raise
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise CannotPrecompute(f"{type(model).__name__} {failure}: {line}") from error


def _differ(ours: torch.Tensor, theirs: torch.Tensor, noise: float) -> bool:
    return ours.shape != theirs.shape or not bool(
        ((ours - theirs).abs().max() <= TOLERANCE[theirs.dtype] * theirs.abs().max() + noise).item()
    )


def same_vectors(kept: torch.Tensor, computed: torch.Tensor, precision: torch.dtype) -> bool:
    """Whether vectors that were stored, and may have been rounded for it, are those that were computed again.

    Args:
        kept: What was stored.
        computed: What the layers put out now, in a batch of other rows.
        precision: The type in which the layers multiply. In mixed precision it is not that of what they put out.
    """
    tolerance = max(TOLERANCE[dtype] for dtype in (kept.dtype, computed.dtype, precision))
    return kept.shape == computed.shape and relative_error(kept.to(computed), computed) <= tolerance


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference as a share of the reference's largest value; 0 where there is none."""
    difference = (value - reference).abs().max()
    return float(difference / reference.abs().max()) if difference else 0.0


def rounding_error(replay: Replay, batch: Batch, cached: torch.Tensor, stored: torch.dtype) -> float:
    """How far the logits move when activations are stored in a type, as a share of the largest; in eval mode."""
    logits = []
    with torch.no_grad(), replay.installed():
        for values in (cached, cached.to(stored).to(cached.dtype)):
            replay.activations = values
            logits.append(logits_of(replay.model(**batch)))
    return relative_error(logits[1], logits[0])


def seconds_saved(replay: Replay, batch: Batch, cached: torch.Tensor, replay_batch: Batch) -> float:
    """By how much a training's forward and backward pass from activations is the shorter one; more than 0.

    With dropout, as in training: on a CPU it takes as long as much of the arithmetic, and the frozen layers do without
    it once they are precomputed. What it draws and what the passes write into buffers is put back.
    """
    model = replay.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(given: Batch) -> None:
        torch.autograd.grad(logits_of(model(**given)).sum(), trained, allow_unused=True)

    with as_in_training(model, cached.device):
        plain = seconds_of(lambda: step(batch))
        with replay.installed():
            replay.activations = cached
            return max(plain - seconds_of(lambda: step(replay_batch)), 1e-6)


def seconds_of(run: Callable[[], Any]) -> float:
    """Wall time of the second of two runs: the first one allocates."""
    for _ in range(2):
        start = time.perf_counter()
        run()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds = time.perf_counter() - start
    return seconds


def logits_of(output: Any) -> torch.Tensor:
    """The logits in a classifier's output."""
    return output["logits"] if isinstance(output, Mapping) else output[0]


def _numbers(
    model: nn.Module, batch: Batch, parameters: list[nn.Parameter], loss: Callable[[Batch], torch.Tensor]
) -> list[Any]:
    """Logits, loss and gradients."""
    logits, value = logits_of(model(**batch)), loss(batch)
    # Every logit counts with another weight, so that no two errors cancel out.
    weights = torch.linspace(-1, 1, logits.numel(), device=logits.device, dtype=logits.dtype).cos().view_as(logits)
    gradients = torch.autograd.grad((logits * weights).sum() + value, parameters, allow_unused=True)
    return [logits.detach(), value.detach(), *gradients]


def read_positions(model: nn.Module, boundary: Boundary, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What leaves the boundary, and which position of each row the layers above read, where it is one a row.

    It is the one at which the gradient of the logits is not zero; found by autograd, so for any pooling.

    Args:
        model: The model, in eval mode.
        boundary: The boundary.
        batch: The model's inputs without labels.

    Returns:
        Shape (rows, tokens, width); and shape (rows,), int64, or None where a row reads several positions or none.
    """
    with torch.enable_grad(), capturing(model, [boundary.path], differentiable=True) as captured:
        logits = logits_of(model(**batch))
        hidden = captured[boundary.path]
        weights = torch.linspace(1, 2, logits.numel(), device=logits.device, dtype=logits.dtype).view_as(logits)
        gradient = torch.autograd.grad((logits * weights).sum(), hidden, allow_unused=True)[0]
    if gradient is None:
        return hidden.detach(), None
    read = gradient.abs().sum(-1) > 0
    return hidden.detach(), read.int().argmax(1) if bool((read.sum(1) == 1).all()) else None


def batches_are_read(trainer: Trainer) -> bool:
    """Whether something beside the model may read the batches, which have one token a row in the vector form.

    A trainer's own loss may hand on some of a batch by name, and leave out the activations that are in it.
    """
    steps = ("compute_loss", "training_step", "prediction_step")
    if any(getattr(getattr(trainer, step), "__func__", None) is not getattr(Trainer, step) for step in steps):
        return True
    return trainer.args.include_num_input_tokens_seen != "no" or "inputs" in trainer.args.include_for_metrics


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def as_in_training(model: nn.Module, device: torch.device) -> Iterator[None]:
    """From eval mode to train mode for a while; the model's buffers and torch's random numbers are put back."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with own_random_numbers(device):
        model.train()
        try:
            yield
        finally:
            model.eval()
            for buffer, kept in buffers:
                if not torch.equal(buffer, kept):
                    buffer.copy_(kept)
