"""A model -> its layer groups: ordered from input to output, named, each parameter in exactly one.

Nothing is run and no weight is read, so this works as well on the meta device, on sharded models and before any
checkpoint is loaded. Two observations carry it:

1. A network is a stack of blocks. The top-most `nn.ModuleList` (or `nn.Sequential`) whose elements are themselves
   made of modules is a stack, and each element one block, however often it is called. Lists of plain layers are none
   (MarkupLM has fifty embeddings in one); lists that one loop walks side by side are one stack (XLM keeps attentions,
   feed-forward layers and their norms in four); a list of lists is one stack, end to end (Funnel).
2. What is in no stack runs before the first block (embeddings), after the last (head) or between two stacks. The
   source of the `forward` methods says where: see `forward_order`.

Two rules that neither tells are tables: `RUNS_LAST` and `RUNS_FIRST`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from os.path import commonprefix
from typing import NamedTuple, overload

from torch import nn

from ulmfit_tools.errors import InputError, nearest
from ulmfit_tools.forward_order import Use, uses_in_forward

RUNS_LAST = frozenset(
    {"classification_head", "classifier", "head", "lm_head", "logits_proj", "pooler", "pre_classifier"}
    | {"qa_outputs", "score", "sequence_summary"}
)
"""Children that belong to the head. Asked where `forward` cannot be read or does not name them, and to let the head
begin at the pooler: CANINE runs one more character-level block after its pooler, which the logits never see."""

RUNS_FIRST = frozenset({"prompt_encoder"})
"""Children that belong to the embeddings: PEFT's virtual tokens enter at the input, and are registered last."""

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
        """The group's tensors in `model`, the model that the group was made from or a copy of it."""
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
        try:
            return self._index_of[parameter_name]
        except KeyError:
            hint = nearest(parameter_name, self._index_of)
            raise InputError(f'No layer group holds a parameter "{parameter_name}".{hint}') from None


def layer_groups(model: nn.Module, num_groups: int | None = None) -> LayerGroups:
    """The layer groups of a model, from input to output.

    The first group is the embeddings with everything else that runs before the first block; then one group for each
    block; the last is the head: pooler, classifier and the norms that run after the last block. What runs between two
    stacks (an encoder's final norm, a decoder's position embeddings) goes with the block that it feeds. Tensors that
    several modules share count once, where they are first used. A vision tower beside a text stack feeds the
    embeddings, and belongs to them. A model without a stack of blocks gets one group for each of its children.

    Wrapped models keep their own parameter names: `DistributedDataParallel`, `torch.compile` and PEFT, whose adapters
    go with the layer that they adapt and whose copies of the head with the head.

    Args:
        model: Any module with parameters; which of them are trainable makes no difference.
        num_groups: Merge into this many contiguous groups, named `first..last`: the last group stays by itself, the
            others are spread evenly over the rest, the earlier ones taking one more where it does not come out even.

    Raises:
        InputError: `num_groups` is below 1 or above the number of groups, or the model has no parameters.
        RuntimeError: A parameter would be in no group or in two (a defect here, never the caller's); it names them.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if not names:
        raise InputError(f"A model without parameters has no layer groups. Received: {type(model).__name__}")
    groups: list[LayerGroup] = []
    placed: set[int] = set()
    for group_name, steps in _named_steps(_steps(model)):
        own = {id(parameter) for step in steps for parameter in _parameters(step.part)} - placed
        placed |= own
        modules = tuple(step.path for step in steps if isinstance(step.part, nn.Module))
        if own:
            groups.append(LayerGroup(group_name, tuple(name for key, name in names.items() if key in own), modules))
        elif groups:  # all of its tensors are shared with earlier groups
            last = groups.pop()
            groups.append(LayerGroup(last.name, last.parameter_names, last.module_names + modules))
    _check_partition(groups, list(names.values()))
    return LayerGroups(tuple(groups if num_groups is None else _merged(groups, num_groups)))


Part = nn.Module | nn.Parameter


class _Step(NamedTuple):
    """A module, or a parameter that stands by itself, at its place in the order of execution."""

    path: str
    part: Part
    block: tuple[str, int] | None = None  # the path of its stack and the block's number there


def _steps(model: nn.Module) -> list[_Step]:
    """All parts of a model, from input to output; together they hold every parameter."""
    stacks, ancestors = _find_stacks(model, with_towers=False)
    if not stacks:
        stacks, ancestors = _find_stacks(model, with_towers=True)
    return list(_walk(model, "", stacks, ancestors or _single_children(model), set()))


def _find_stacks(model: nn.Module, with_towers: bool) -> tuple[set[int], set[int]]:
    """The ids of the top-most stacks of blocks, and those of the modules that contain one."""
    stacks, ancestors = set(), set()

    def search(module: nn.Module) -> bool:
        if _is_tower(module) and not with_towers:
            return False
        if _is_stack(module):
            stacks.add(id(module))
            return True
        found = [search(child) for child in module.children()]
        if any(found):
            ancestors.add(id(module))
        return any(found)

    search(model)
    return stacks, ancestors


def _single_children(model: nn.Module) -> set[int]:
    """For a model without a stack: the ids of the wrappers around its parts, each with a single child."""
    wrappers = {id(model)}
    parts = list(_parts(model).values())
    while len(parts) == 1 and isinstance(parts[0], nn.Module) and _parts(parts[0]):
        wrappers.add(id(parts[0]))
        parts = list(_parts(parts[0]).values())
    return wrappers


def _is_tower(module: Part) -> bool:
    """Whether this is a transformers model that does not read text, as its class declares."""
    return "text" not in getattr(module, "input_modalities", "text")


def _is_stack(module: nn.Module) -> bool:
    """Whether this is a list of blocks; a `Sequential` of different modules is a small network, not a stack."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    blocks = [block for block in module if _has_parameters(block)]
    if isinstance(module, nn.Sequential) and (len(blocks) < 2 or len({type(block) for block in blocks}) > 1):
        return False
    return bool(blocks) and all(_is_block(block) for block in blocks)


def _is_block(module: nn.Module) -> bool:
    """Whether a module is made of modules, whatever PEFT wraps around it; a recurrent layer counts as a block."""
    module = getattr(module, "base_layer", module)
    if isinstance(module, nn.ModuleList):
        return _is_stack(module)
    return isinstance(module, nn.RNNBase) or any(_has_parameters(child) for child in module.children())


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _parts(module: nn.Module) -> dict[str, Part]:
    """A module's own parameters, and its children that have any, in order of registration."""
    children = {name: child for name, child in module.named_children() if _has_parameters(child)}
    return {**dict(module.named_parameters(recurse=False)), **children}


def _walk(module: nn.Module, path: str, stacks: set[int], ancestors: set[int], seen: set[int]) -> Iterator[_Step]:
    """The steps inside a module that contains stacks; `seen` holds the ids of what has had its turn."""
    parts = _parts(module)
    uses = uses_in_forward(type(module))
    order = _in_order(parts, uses)
    beside = _beside_stacks({name: parts[name] for name in order}, stacks, uses)
    followers = {other for names in beside.values() for other in names}
    for name in order:
        part, part_path = parts[name], _join(path, name)
        if name in followers or id(part) in seen:  # one module may be registered under two names
            continue
        seen.add(id(part))
        if name in beside:
            yield from _stack_steps(part_path, part, {_join(path, other): parts[other] for other in beside[name]})
        elif isinstance(part, nn.Module) and id(part) in ancestors:
            yield from _walk(part, part_path, stacks, ancestors, seen)
        else:
            yield _Step(part_path, part)


def _in_order(parts: dict[str, Part], uses: tuple[Use, ...]) -> list[str]:
    """The names of a module's parts in order of use; one that `forward` does not name stays with its neighbour."""
    first, looped = _first_uses(uses)
    positions: dict[str, float] = {}
    neighbour = -1.0
    for name, part in parts.items():
        if name in RUNS_FIRST or _is_tower(part):
            positions[name] = -1.0
        elif name in RUNS_LAST and name not in first:
            positions[name] = float("inf")
        else:
            # A list is used where it is looped over, not where its length or its first element is asked for.
            place = looped if isinstance(part, nn.ModuleList) and name in looped else first
            neighbour = positions[name] = place.get(name, neighbour)
    return sorted(parts, key=lambda name: positions[name])


def _first_uses(uses: tuple[Use, ...]) -> tuple[dict[str, int], dict[str, int]]:
    """The first use of each name, and the first one inside a loop, as positions in `uses`."""
    backwards = list(reversed(list(enumerate(uses))))
    first = {use.name: position for position, use in backwards}
    looped = {use.name: position for position, use in backwards if use.loop is not None}
    return first, looped


def _beside_stacks(parts: dict[str, Part], stacks: set[int], uses: tuple[Use, ...]) -> dict[str, list[str]]:
    """For each stack, the names of the parts that the loop over it uses as well.

    These are lists that are walked side by side with it, and single modules (DeBERTa-v2 has a convolution after its
    first block). Without a source to read, lists of the same length are taken to be walked side by side.
    """
    first, looped = ({name: uses[place].loop for name, place in places.items()} for places in _first_uses(uses))
    beside: dict[str, list[str]] = {}
    taken: set[str] = set()
    for name, part in parts.items():
        if id(part) not in stacks or name in taken:
            continue
        loop = looped.get(name)
        beside[name] = []
        for other, other_part in parts.items():
            if isinstance(other_part, nn.ModuleList):
                same_loop = looped.get(other) == loop if uses else True
                used_with = same_loop and (loop is not None or not uses) and _same_length(part, other_part)
            else:
                used_with = loop is not None and first.get(other) == loop
            if used_with and other != name and other not in taken:
                beside[name].append(other)
        taken.update(beside[name])
    return beside


def _same_length(stack: Part, other: Part) -> bool:
    return len(_blocks("", stack)) == len(_blocks("", other))


def _blocks(path: str, stack: Part) -> list[tuple[str, Part]]:
    """The elements of a list with their paths; those of a list of lists end to end."""
    blocks: list[tuple[str, Part]] = []
    for name, block in _parts(stack).items():
        nested = isinstance(block, nn.ModuleList)
        blocks += _blocks(_join(path, name), block) if nested else [(_join(path, name), block)]
    return blocks


def _stack_steps(path: str, stack: Part, beside: dict[str, Part]) -> Iterator[_Step]:
    """One step for each block, with what is beside it; what is beside the whole stack goes with its first block."""
    lists = {path: stack} | {name: part for name, part in beside.items() if isinstance(part, nn.ModuleList)}
    rows = zip(*(_blocks(*item) for item in lists.items()), strict=True)
    for index, row in enumerate(rows):
        for block_path, block in row:
            yield _Step(block_path, block, (path, index))
        if index == 0:
            for name in beside.keys() - lists.keys():
                yield _Step(name, beside[name], (path, index))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _named_steps(steps: list[_Step]) -> list[tuple[str, list[_Step]]]:
    """The groups as names and steps: `embeddings`, the blocks, `head`."""
    if not any(step.block for step in steps):
        return _named_children(steps)
    prefixes = _stack_prefixes(list(dict.fromkeys(step.block[0] for step in steps if step.block)))
    groups: list[tuple[str, list[_Step]]] = []
    waiting: list[_Step] = []  # what runs before the next block
    blocks: dict[tuple[str, int], list[_Step]] = {}
    in_head = False
    for step in steps:
        in_head = in_head or (bool(blocks) and step.path.rpartition(".")[2] in RUNS_LAST)
        if step.block is None or in_head:
            waiting.append(step)
            continue
        if step.block not in blocks:
            if not blocks:
                groups.append((EMBEDDINGS, waiting))
                waiting = []
            blocks[step.block] = waiting
            groups.append((f"{prefixes[step.block[0]]}layer.{step.block[1]}", waiting))
            waiting = []
        blocks[step.block].append(step)
    return [*groups, (HEAD, waiting)]


def _named_children(steps: list[_Step]) -> list[tuple[str, list[_Step]]]:
    """For a model without a stack: one group for each child; bare parameters go with the child that follows."""
    groups: list[tuple[str, list[_Step]]] = []
    waiting: list[_Step] = []
    for step in steps:
        waiting.append(step)
        if isinstance(step.part, nn.Module) or step is steps[-1]:
            groups.append((step.path.rpartition(".")[2], waiting))
            waiting = []
    return groups


def _stack_prefixes(paths: list[str]) -> dict[str, str]:
    """What tells stacks apart: nothing for one, `encoder.` and `decoder.` for `model.encoder.layers` and its peer."""
    if len(paths) == 1:
        return {paths[0]: ""}
    parts = [path.split(".") for path in paths]
    common = len(commonprefix(parts))
    short = [rest[common] for rest in parts]
    unique = len(set(short)) == len(short)
    return {
        path: (short_name if unique else ".".join(rest[common:])) + "."
        for path, rest, short_name in zip(paths, parts, short, strict=True)
    }


def _parameters(part: Part) -> list[nn.Parameter]:
    return [part] if isinstance(part, nn.Parameter) else list(part.parameters())


def _check_partition(groups: list[LayerGroup], names: list[str]) -> None:
    counts = Counter(name for group in groups for name in group.parameter_names)
    missing = [name for name in names if name not in counts]
    twice = [name for name, count in counts.items() if count > 1]
    if missing or twice:
        raise RuntimeError(f"Parameters in no layer group: {missing}; in more than one: {twice}")


def _merged(groups: list[LayerGroup], num_groups: int) -> list[LayerGroup]:
    """Contiguous groups: the last by itself, the others as evenly as they come."""
    if not 1 <= num_groups <= len(groups):
        raise InputError(f"num_groups must be from 1 to {len(groups)} for this model. Received: num_groups={num_groups}")
    if num_groups == 1:
        return [_joined(groups)]
    size, larger = divmod(len(groups) - 1, num_groups - 1)
    ends = list(accumulate(size + (index < larger) for index in range(num_groups - 1)))
    return [*(_joined(groups[start:end]) for start, end in zip([0, *ends], ends)), groups[-1]]


def _joined(groups: list[LayerGroup]) -> LayerGroup:
    if len(groups) == 1:
        return groups[0]
    return LayerGroup(
        f"{groups[0].name}..{groups[-1].name}",
        tuple(chain.from_iterable(group.parameter_names for group in groups)),
        tuple(chain.from_iterable(group.module_names for group in groups)),
    )
