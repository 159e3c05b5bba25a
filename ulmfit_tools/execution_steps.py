"""A model -> its parts in order of execution: the modules and bare parameters between its blocks, and the blocks.

Nothing is run and no weight is read, so this works as well on the meta device and on sharded models. Two observations
carry it:

1. A network is a stack of blocks. The top-most `nn.ModuleList` (or `nn.Sequential`) whose elements are themselves
   made of modules is a stack, and each element one block, however often it is called. Lists of plain layers are none
   (MarkupLM has fifty embeddings in one); lists that one loop walks side by side are one stack (XLM keeps attentions,
   feed-forward layers and their norms in four); a list of lists is one stack, end to end (Funnel).
2. The source of the `forward` methods between the model and its stacks says in which order they use their parts; see
   `forward_order`.

What neither tells is in two tables, `RUNS_LAST` and `RUNS_FIRST`.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from ulmfit_tools.forward_order import Use, uses_in_forward

RUNS_LAST = frozenset(
    {"classification_head", "classifier", "head", "lm_head", "logits_proj", "pooler", "pre_classifier"}
    | {"qa_outputs", "score", "sequence_summary"}
)
"""Names of what belongs to the head. They decide where `forward` cannot be read or does not name a part, and the first
of them behind a block begins the head: CANINE runs one more block after its pooler, which its logits never see."""

RUNS_FIRST = frozenset({"prompt_encoder"})
"""Names of what belongs to the embeddings: PEFT's virtual tokens enter with the input but come last in the source."""

Part = nn.Module | nn.Parameter


class Step(NamedTuple):
    """A part at its place in the order of execution.

    Args:
        path: Its name in `model.named_modules()` or `model.named_parameters()`.
        part: A module, or a parameter that stands outside of any such module.
        block: The path of the stack and the number of the block that it belongs to; None outside of any stack.
    """

    path: str
    part: Part
    block: tuple[str, int] | None = None


def execution_steps(model: nn.Module) -> list[Step]:
    """The parts of a model from input to output; together they hold every parameter.

    Vision towers are parts, not stacks, as long as something else in the model is a stack. A model without any stack
    is taken apart into the children of the innermost module that has more than one.
    """
    stacks, ancestors = _find_stacks(model, with_towers=False)
    if not stacks:
        stacks, ancestors = _find_stacks(model, with_towers=True)
    return list(_walk(model, "", stacks, ancestors or _wrappers(model), set()))


def parts_of(module: nn.Module) -> dict[str, Part]:
    """A module's own parameters, and its children that have any, in order of registration."""
    children = {name: child for name, child in module.named_children() if _has_parameters(child)}
    return {**dict(module.named_parameters(recurse=False)), **children}


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _find_stacks(model: nn.Module, with_towers: bool) -> tuple[set[int], set[int]]:
    """The ids of the top-most stacks of blocks, and those of the modules that contain one."""
    stacks: set[int] = set()
    ancestors: set[int] = set()

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


def _is_tower(module: nn.Module) -> bool:
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


def _wrappers(model: nn.Module) -> set[int]:
    """For a model without a stack: the ids of the model and of the modules inside that are a single child."""
    wrappers = {id(model)}
    parts = list(parts_of(model).values())
    while len(parts) == 1 and isinstance(parts[0], nn.Module) and parts_of(parts[0]):
        wrappers.add(id(parts[0]))
        parts = list(parts_of(parts[0]).values())
    return wrappers


def _walk(module: nn.Module, path: str, stacks: set[int], ancestors: set[int], seen: set[int]) -> Iterator[Step]:
    """The steps inside a module that is to be taken apart; `seen` holds the ids of what has had its turn."""
    parts = parts_of(module)
    uses = uses_in_forward(type(module))  # type: ignore[arg-type]  # mypy takes classes of modules for unhashable
    order = _in_order(parts, uses)
    beside = _beside_stacks({name: parts[name] for name in order}, stacks, uses)
    followers = {other for names in beside.values() for other in names}
    for name in order:
        part, part_path = parts[name], _join(path, name)
        if name in followers or id(part) in seen:  # one module may be registered under two names
            continue
        seen.add(id(part))
        if isinstance(part, nn.Parameter):
            yield Step(part_path, part)
        elif name in beside:
            yield from _stack_steps(part_path, part, {_join(path, other): parts[other] for other in beside[name]})
        elif id(part) in ancestors:
            yield from _walk(part, part_path, stacks, ancestors, seen)
        else:
            yield Step(part_path, part)


def _in_order(parts: dict[str, Part], uses: tuple[Use, ...]) -> list[str]:
    """The names of a module's parts in order of use; one that `forward` does not name stays with its neighbour."""
    positions: dict[str, float] = {}
    neighbour = -1.0
    for name, part in parts.items():
        place = _place_of_use(name, part, uses)
        if name in RUNS_FIRST:
            positions[name] = -1.0
        elif place is None and name in RUNS_LAST:
            positions[name] = float("inf")
        else:
            neighbour = positions[name] = neighbour if place is None else place
    return sorted(parts, key=lambda name: positions[name])


def _place_of_use(name: str, part: Part, uses: tuple[Use, ...]) -> int | None:
    """Where `forward` first runs a part: the place in `uses`, or None where it does not name it.

    A list runs where it is looped over and a module where it is called, if either is seen; before that, somebody may
    have asked for the length of the one and the dtype of the other.
    """
    places = [place for place, use in enumerate(uses) if use.name == name]
    if isinstance(part, nn.ModuleList):
        runs = [place for place in places if uses[place].loop is not None]
    else:
        runs = [place for place in places if uses[place].called]
    return next(iter(runs or places), None)


def _beside_stacks(parts: dict[str, Part], stacks: set[int], uses: tuple[Use, ...]) -> dict[str, list[str]]:
    """For each stack, the names of the parts that the loop over it uses as well.

    These are lists that are walked side by side with it, and single modules (DeBERTa-v2 has a convolution after its
    first block). Without a source to read, lists of the same length are taken to be walked side by side.
    """
    places = {name: _place_of_use(name, part, uses) for name, part in parts.items()}
    loops = {name: None if place is None else uses[place].loop for name, place in places.items()}

    def runs_beside(name: str, other: str) -> bool:
        stack, part = parts[name], parts[other]
        if isinstance(part, nn.ModuleList):
            same_loop = loops[other] == loops[name] is not None or not uses
            return same_loop and len(_blocks("", part)) == len(_blocks("", stack))
        return loops[other] == loops[name] is not None

    beside: dict[str, list[str]] = {}
    taken: set[str] = set()
    for name, part in parts.items():
        if id(part) in stacks and name not in taken:
            beside[name] = [other for other in parts if other not in {name, *taken} and runs_beside(name, other)]
            taken.update(beside[name])
    return beside


def _blocks(path: str, stack: Part) -> list[tuple[str, Part]]:
    """The elements of a list with their paths; those of a list of lists end to end."""
    blocks: list[tuple[str, Part]] = []
    for name, block in parts_of(stack).items() if isinstance(stack, nn.Module) else ():
        nested = isinstance(block, nn.ModuleList)
        blocks += _blocks(_join(path, name), block) if nested else [(_join(path, name), block)]
    return blocks


def _stack_steps(path: str, stack: nn.Module, beside: dict[str, Part]) -> Iterator[Step]:
    """One step for each block and for what is beside it; what is beside the whole stack goes with its first block."""
    lists = {path: stack} | {name: part for name, part in beside.items() if isinstance(part, nn.ModuleList)}
    rows = zip(*(_blocks(name, part) for name, part in lists.items()), strict=True)
    for index, row in enumerate(rows):
        for block_path, block in row:
            yield Step(block_path, block, (path, index))
        if index == 0:
            for name in beside.keys() - lists.keys():
                yield Step(name, beside[name], (path, index))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
