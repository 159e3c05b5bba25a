"""Where the frozen part of a model ends, what leaves it there, and running the rest from that.

The *boundary* is the last of the blocks that are frozen together with all that runs before them. What it puts out for
a row does not change while these layers stay frozen, so it can be computed once.

The model stays whole and runs its own `forward`, in which the frozen blocks do no work: those before the boundary hand
on what they were given, and the boundary hands on what it put out before (the *replay*). Masks, positions and all that
the layers above read are made by the model's own code from the model's own inputs, so this holds for any architecture
whose blocks form a chain, and `replay_check` finds the others out.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ulmfit_tools.errors import InputError
from ulmfit_tools.execution_steps import execution_steps

Batch = Mapping[str, torch.Tensor]


class CannotPrecompute(InputError):
    """The activations of a model's frozen part cannot stand in for it; the message says why in one line."""


@dataclass(frozen=True)
class Boundary:
    """The end of a model's frozen part.

    Args:
        path: The name of the last frozen block in `model.named_modules()`.
        blocks: The names of all frozen blocks in order of execution, this one last.
        steps: The names of all modules and parameters up to it, embeddings included.
    """

    path: str
    blocks: tuple[str, ...]
    steps: tuple[str, ...]

    def holds(self, name: str) -> bool:
        """Whether a parameter or buffer of this name is in the frozen part."""
        return name in self.steps or name.startswith(tuple(f"{step}." for step in self.steps))

    def cut(self, count: int) -> "Boundary":
        """The boundary after the first `count` of the blocks."""
        path = self.blocks[count - 1]
        return Boundary(path, self.blocks[:count], self.steps[: self.steps.index(path) + 1])


def find_boundary(model: nn.Module, trainable: Collection[str] | None = None) -> Boundary:
    """The boundary of a model as its parameters are frozen now, or as they would be.

    Args:
        model: The model.
        trainable: The names of the parameters that train; by default those with `requires_grad`.

    Returns:
        The boundary.

    Raises:
        CannotPrecompute: No block is frozen together with all that runs before it, or the blocks are no chain of
            modules.
    """
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    if trainable is None:
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise CannotPrecompute("The model has no trainable parameters, so there is nothing to train from activations")
    trained = {id(p) for name, p in model.named_parameters() if name in trainable}
    frozen = []
    for step in execution_steps(model):
        parameters = [step.part] if isinstance(step.part, nn.Parameter) else list(step.part.parameters())
        if any(id(parameter) in trained for parameter in parameters):
            break
        frozen.append(step)
    blocks = [step for step in frozen if step.block is not None]
    if not blocks:
        first = next((name for name in names.values() if name in trainable), "")
        raise CannotPrecompute(f"No block of layers is frozen below what trains (the first of it is {first})")
    if max(Counter(step.block for step in blocks).values()) > 1:
        raise CannotPrecompute(f"The blocks of {type(model).__name__} are no chain: several modules make up each one")
    last = frozen.index(blocks[-1])
    return Boundary(blocks[-1].path, tuple(b.path for b in blocks), tuple(step.path for step in frozen[: last + 1]))


def adapters_in_use(model: nn.Module, boundary: Boundary) -> dict[str, list[Any]]:
    """Of PEFT's layers in the frozen part, by name: which adapters are active, their scaling, and whether none is."""
    return {
        name: [getattr(module, setting, None) for setting in ("active_adapters", "scaling", "disable_adapters")]
        for name, module in model.named_modules()
        if boundary.holds(name) and hasattr(module, "merged_adapters")
    }


# ---- Capturing and replaying ---------------------------------------------------------------------------------------


class Enough(Exception):
    """Ends a forward pass of which all that is wanted has been captured."""


@contextmanager
def capturing(
    model: nn.Module, paths: Sequence[str], *, differentiable: bool = False, last: str | None = None
) -> Iterator[dict[str, Any]]:
    """Note what blocks put out, in the last of their calls where one block is called many times.

    Args:
        model: The model.
        paths: The names of the blocks.
        differentiable: Cut the graph at each block, and let what leaves it take a gradient.
        last: End the forward pass after the first call of this block, by `Enough`.

    Yields:
        Filled by each forward pass: the block's name -> what left it, shape (rows, tokens, width).

    Raises:
        CannotPrecompute: In the forward pass, where a block's output does not begin with such a tensor.
    """
    captured: dict[str, Any] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            first = output[0] if type(output) in (tuple, list) else output
            if not isinstance(first, torch.Tensor) or first.dim() != 3:
                raise CannotPrecompute(f"{path} puts out no tensor of the shape (rows, tokens, width)")
            captured[path] = first.detach().requires_grad_() if differentiable else first
            if path == last:
                raise Enough
            return type(output)((captured[path], *output[1:])) if first is not output else captured[path]

        return hook

    handles = [model.get_submodule(path).register_forward_hook(note(path)) for path in paths]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


class Replay:
    """Stands in for the frozen part of a model, between `install` and `remove`, in batches that have activations.

    Args:
        model: The model.
        boundary: Its boundary.
        like: An other replay of the same model, whose `learn` this one need not repeat.

    Attributes:
        calls: How often a forward pass calls each frozen block; `learn` notes it.
        forms: In what each frozen block gives its output: the type, tuple or list, and its length; None where it is a
            bare tensor. `learn` notes them.
        activations: What the boundary is to put out, shape (rows, tokens, width); set before each forward pass. Where
            it is None, the layers themselves run.
    """

    def __init__(self, model: nn.Module, boundary: Boundary, like: "Replay | None" = None) -> None:
        self.model = model
        self.boundary = boundary
        self.activations: torch.Tensor | None = None
        self.forms: dict[str, tuple[type, int] | None] = {} if like is None else like.forms
        self.calls: Counter[str] = Counter() if like is None else like.calls
        self._own: dict[str, Any] = {}  # what a wrapper has put into the place of a block's forward

    def install(self) -> None:
        """Replace the forward of the frozen blocks."""
        for path in self.boundary.blocks:
            block = self.model.get_submodule(path)
            if "forward" in vars(block):
                self._own[path] = block.forward
            block.forward = self._stand_in(path, block.forward)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The replay for a while; what runs before and after it are the layers themselves."""
        self.install()
        try:
            yield
        finally:
            self.remove()
            self.activations = None

    def remove(self) -> None:
        """Give the frozen blocks their own forward back."""
        for path in self.boundary.blocks:
            block = self.model.get_submodule(path)
            vars(block).pop("forward", None)
            if path in self._own:
                block.forward = self._own.pop(path)

    def learn(self, batch: Batch) -> torch.Tensor:
        """Run the layers themselves on a batch, and note in which form each frozen block gives its output.

        Returns:
            What left the boundary, shape (rows, tokens, width).
        """
        handles = []
        for path in self.boundary.blocks:

            def note(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                self.forms[path] = (type(output), len(output)) if type(output) in (tuple, list) else None
                self.calls[path] += 1

            handles.append(self.model.get_submodule(path).register_forward_hook(note))
        try:
            with capturing(self.model, [self.boundary.path]) as captured, torch.no_grad():
                self.model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        if self.boundary.path not in captured:
            raise CannotPrecompute(f"{self.boundary.path} is not called in the forward pass")
        return captured[self.boundary.path]

    def _stand_in(self, path: str, own: Any) -> Any:
        is_last = path == self.boundary.path

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.activations is None:
                return own(*args, **kwargs)
            given = (value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor))
            hidden = self.activations if is_last else next(given)
            form = self.forms[path]
            return hidden if form is None else form[0]((hidden, *[None] * (form[1] - 1)))

        return forward


# ---- Rows with and without padding ---------------------------------------------------------------------------------


def padded(vectors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Vectors, one row after another, in the places of a batch where its mask is not 0, and zeros elsewhere.

    Args:
        vectors: Shape (sum of the rows' tokens, width).
        mask: Shape (rows, tokens); the padding may be on either side.

    Returns:
        Shape (rows, tokens, width).
    """
    batch = vectors.new_zeros(*mask.shape, vectors.shape[-1])
    batch[mask.bool()] = vectors
    return batch


def in_row(positions: torch.Tensor, mask: torch.Tensor) -> list[int]:
    """Positions in a padded batch, as positions among the tokens of each row; shape (rows,)."""
    return (mask.bool().cumsum(1).gather(1, positions[:, None])[:, 0] - 1).tolist()


def in_batch(at: Sequence[int] | torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Positions among the tokens of each row, as positions in the padded batch; shape (rows,), the way back."""
    wanted = torch.as_tensor(at, device=mask.device)[:, None] + 1
    return (mask.bool() & (mask.bool().cumsum(1) == wanted)).int().argmax(1)


def one_token(batch: Batch, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of a batch at one position a row: shape (rows, 1) where it was (rows, tokens)."""
    shape = batch["input_ids"].shape
    return {
        name: value.gather(1, positions[:, None]) if value.shape == shape else value for name, value in batch.items()
    }
