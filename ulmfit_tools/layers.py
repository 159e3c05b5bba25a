"""A model -> its layer groups: ordered from input to output, named, each parameter in exactly one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import overload

from torch import nn

from ulmfit_tools.errors import InputError, nearest
from ulmfit_tools.execution_steps import RUNS_LAST, Step, execution_steps

EMBEDDINGS, HEAD = "embeddings", "head"


@dataclass(frozen=True)
class LayerGroup:
    """Parameters that are frozen, thawed and given a rate together.

    Args:
        name: `embeddings`, `layer.0`, ..., `head`; `encoder.layer.0` where a model has more than one stack of blocks.
        parameter_names: As in `model.named_parameters()`, where a tied tensor has one name.
        module_names: The top-most modules that the group is made of, in order of execution, as in
            `model.named_modules()`. Parameters that stand outside of any such module are only in `parameter_names`.
    """

    name: str
    parameter_names: tuple[str, ...]
    module_names: tuple[str, ...]

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The group's tensors in `model`, the model that the group was made from or one like it."""
        parameters = dict(model.named_parameters())
        return [parameters[name] for name in self.parameter_names]


@dataclass(frozen=True)
class LayerGroups(Sequence[LayerGroup]):
    """Layer groups from input to output: a sequence that also answers to parameter names."""

    groups: tuple[LayerGroup, ...]

    @overload
    def __getitem__(self, index: int) -> LayerGroup: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LayerGroup, ...]: ...
    def __getitem__(self, index):
        return self.groups[index]

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def names(self) -> list[str]:
        """The names of the groups, from input to output."""
        return [group.name for group in self.groups]

    @cached_property
    def _index_of(self) -> dict[str, int]:
        return {name: index for index, group in enumerate(self.groups) for name in group.parameter_names}

    def index_of(self, parameter_name: str) -> int:
        """The position of the group that holds a parameter.

        Args:
            parameter_name: As in `model.named_parameters()`.

        Raises:
            InputError: No group holds a parameter of that name.
        """
        if parameter_name not in self._index_of:
            hint = nearest(parameter_name, self._index_of)
            raise InputError(f'No layer group holds a parameter "{parameter_name}".{hint}')
        return self._index_of[parameter_name]


def layer_groups(model: nn.Module, num_groups: int | None = None) -> LayerGroups:
    """The layer groups of a model, from input to output.

    The first group is the embeddings with everything else that runs before the first block; then comes one group for
    each block; the last is the head: pooler, classifier and the norms that run after the last block. What runs between
    two stacks (an encoder's final norm, a decoder's position embeddings) goes with the block that it feeds. Tensors
    that several modules share count once, where they are first used. A vision tower beside the text stack feeds the
    token embeddings and belongs to them. A model without a stack of blocks gets one group for each of its children.

    Wrapped models keep their own parameter names: `DistributedDataParallel`, `torch.compile`, and PEFT, whose adapters
    go with the layer that they adapt and whose copies of the head go with the head.

    Args:
        model: Any module with parameters, on any device, `meta` included; which of them are trainable makes no
            difference.
        num_groups: Merge into this many contiguous groups, named `first..last`: the last group stays by itself, the
            others are spread evenly over the rest, the earlier ones taking one more where it does not come out even.

    Raises:
        InputError: `num_groups` is below 1 or above the number of groups, or the model has no parameters.
        RuntimeError: A parameter would be in no group or in two, which is a defect here; it names them.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if not names:
        raise InputError(f"A model without parameters has no layer groups. Received: {type(model).__name__}")
    groups = _without_ties(_named_steps(execution_steps(model)), names)
    check_partition(groups, list(names.values()))
    return LayerGroups(tuple(groups if num_groups is None else _merged(groups, num_groups)))


def check_partition(groups: Sequence[LayerGroup], parameter_names: Sequence[str]) -> None:
    """Makes sure that each parameter is in exactly one group.

    Raises:
        RuntimeError: One is not; all that are not are named.
    """
    counts = Counter(name for group in groups for name in group.parameter_names)
    missing = [name for name in parameter_names if name not in counts]
    twice = [name for name, count in counts.items() if count > 1]
    if missing or twice:
        raise RuntimeError(f"Parameters in no layer group: {missing}; in more than one: {twice}")


def _without_ties(named_steps: list[tuple[str, list[Step]]], names: dict[int, str]) -> list[LayerGroup]:
    """The groups with each tensor, told by its id, only in the first that uses it.

    A module that brings no tensor of its own goes where its tensors are, so that it is frozen when they are; a group
    that this leaves empty is none.
    """
    groups: list[tuple[str, list[str]]] = []
    owner: dict[int, int] = {}
    for group_name, steps in named_steps:
        modules: list[str] = []
        for step in steps:
            tensors = [step.part] if isinstance(step.part, nn.Parameter) else step.part.parameters()
            places = {owner.setdefault(id(tensor), len(groups)) for tensor in tensors}
            if isinstance(step.part, nn.Module):
                (modules if len(groups) in places else groups[max(places)][1]).append(step.path)
        if len(groups) in owner.values():
            groups.append((group_name, modules))
    held: list[list[str]] = [[] for _ in groups]
    for key, name in names.items():
        if key in owner:
            held[owner[key]].append(name)
    return [LayerGroup(name, tuple(own), tuple(paths)) for (name, paths), own in zip(groups, held, strict=True)]


def _named_steps(steps: list[Step]) -> list[tuple[str, list[Step]]]:
    """The steps of each group with its name: the embeddings, the blocks, the head."""
    stacks = list(dict.fromkeys(step.block[0] for step in steps if step.block))
    if not stacks:
        return _one_group_a_child(steps)
    prefixes = _prefixes(stacks)
    groups: list[tuple[str, list[Step]]] = []
    waiting: list[Step] = []  # for the block that they run before
    current, in_head = None, False
    for step in steps:
        in_head = in_head or (current is not None and step.path.rpartition(".")[2] in RUNS_LAST)
        if step.block is None or in_head:
            waiting.append(step)
            continue
        if step.block != current:
            if current is None:
                groups.append((EMBEDDINGS, waiting))
                waiting = []
            current = step.block
            groups.append((f"{prefixes[current[0]]}layer.{current[1]}", waiting))
            waiting = []
        groups[-1][1].append(step)
    return [*groups, (HEAD, waiting)]


def _one_group_a_child(steps: list[Step]) -> list[tuple[str, list[Step]]]:
    """The groups of a model without a stack; bare parameters go with the module that follows, or else the last."""
    groups: list[tuple[str, list[Step]]] = []
    waiting: list[Step] = []
    for step in steps:
        waiting.append(step)
        if isinstance(step.part, nn.Module):
            groups.append((step.path.rpartition(".")[2], waiting))
            waiting = []
    if not groups:
        return [(HEAD, waiting)]
    groups[-1][1].extend(waiting)
    return groups


def _prefixes(stacks: list[str]) -> dict[str, str]:
    """What tells stacks apart: nothing for one, `encoder.` and `decoder.` for `model.encoder.layers` and its peer."""
    if len(stacks) == 1:
        return {stacks[0]: ""}
    names = [path.split(".") for path in stacks]
    start = next(place for place, parts in enumerate(zip(*names, strict=False)) if len(set(parts)) > 1)
    is_enough = len({parts[start] for parts in names}) == len(stacks)
    ends = [start + 1 if is_enough else len(parts) for parts in names]
    return {path: ".".join(parts[start:end]) + "." for path, parts, end in zip(stacks, names, ends, strict=True)}


def _merged(groups: list[LayerGroup], num_groups: int) -> list[LayerGroup]:
    """Contiguous groups: the last by itself, the others as evenly as they come."""
    if not 1 <= num_groups <= len(groups):
        raise InputError(f"num_groups must be from 1 to {len(groups)}, for this model. Received: {num_groups}")
    if num_groups == 1:
        return [_joined(groups)]
    size, larger = divmod(len(groups) - 1, num_groups - 1)
    ends = accumulate([size + (index < larger) for index in range(num_groups - 1)], initial=0)
    return [*(_joined(groups[start:end]) for start, end in pairwise(ends)), groups[-1]]


def _joined(groups: list[LayerGroup]) -> LayerGroup:
    if len(groups) == 1:
        return groups[0]
    return LayerGroup(
        f"{groups[0].name}..{groups[-1].name}",
        tuple(chain.from_iterable(group.parameter_names for group in groups)),
        tuple(chain.from_iterable(group.module_names for group in groups)),
    )
