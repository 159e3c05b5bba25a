"""In which order a module uses its children, read from the source of its `forward`.

The order in which children are registered says little: XLM-RoBERTa registers its classifier before its encoder, OPT
its final norm before its blocks, BART the norm of its embeddings after them. The source of `forward` names them in
the order of use, needs no weights, no input and no device, and costs milliseconds.
"""

import ast
import inspect
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType
from typing import TypeGuard

from torch import nn


@dataclass(frozen=True)
class Use:
    """One place where `forward` uses an attribute of `self`.

    Args:
        name: The attribute.
        called: Whether it is called, as in `self.pooler(x)` but not in `self.pooler.dense.weight.dtype`.
        loop: The innermost `for` loop around it (its header counts as inside), or `None`.
    """

    name: str
    called: bool
    loop: int | None


@cache
def uses_in_forward(module_class: type) -> tuple[Use, ...]:
    """The attributes of `self` that `forward` uses, in order of evaluation.

    Methods of the class are read where they are called, also through `super()`, and so is
    `getattr(self, self.base_model_prefix)`. Where a condition decides, both branches are read, one after the other.

    Args:
        module_class: The class of a module.

    Returns:
        The uses in order; empty where there is no source to read.
    """
    reader = _ForwardReader(module_class)
    reader.read_method("forward", module_class.__mro__)
    return tuple(reader.uses)


@dataclass
class _ForwardReader:
    """Walks the syntax tree of `forward` and of the methods that it calls, each once."""

    module_class: type
    uses: list[Use] = field(default_factory=list)
    loops: int = 0
    loop: int | None = None
    read: set[FunctionType] = field(default_factory=set)

    def read_method(self, name: str, classes: tuple[type, ...]) -> bool:
        """Reads the method that `classes`, in this order, resolve `name` to; False where it is none."""
        owners = [owner for owner in classes if name in vars(owner)]
        if not owners or owners[0] is nn.Module:
            return False
        method = inspect.unwrap(vars(owners[0])[name])
        if not isinstance(method, FunctionType):
            return False
        if method not in self.read:
            self.read.add(method)
            self._read_source(method, owners[0])
        return True

    def _read_source(self, method: FunctionType, owner: type) -> None:
        try:
            source = inspect.getsource(method)
            tree = ast.parse("if True:\n" + source if source[0].isspace() else source)  # indented in its class
        except (OSError, TypeError, SyntaxError):  # compiled, or typed into an interpreter
            return
        for definition in ast.walk(tree):
            if isinstance(definition, ast.FunctionDef) and definition.args.args:
                _Visitor(self, owner, definition.args.args[0].arg).visit_all(definition.body)
                return

    def note(self, name: str, called: bool) -> None:
        """Notes a use of an attribute, or reads on in the method that it is."""
        if not self.read_method(name, self.module_class.__mro__):
            self.uses.append(Use(name, called, self.loop))


class _Visitor(ast.NodeVisitor):
    """One method's syntax tree, in order of evaluation: arguments before the call, the value before its target."""

    def __init__(self, reader: _ForwardReader, owner: type, self_name: str):
        self.reader = reader
        self.owner = owner
        self.self_name = self_name

    def visit_all(self, nodes: list[ast.stmt]) -> None:
        for node in nodes:
            self.visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        for argument in [*node.args, *node.keywords]:
            self.visit(argument)
        called, itself = self._attribute_of_self(node.func), self._attribute_of_self(node)
        if called is not None:
            self.reader.note(called, called=True)
        elif itself is not None:
            self.reader.note(itself, called=False)
        elif isinstance(node.func, ast.Attribute) and _is_call_of(node.func.value, "super"):
            classes = self.reader.module_class.__mro__
            self.reader.read_method(node.func.attr, classes[classes.index(self.owner) + 1 :])
        else:
            self.visit(node.func)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self._attribute_of_self(node)
        if name is None:
            self.visit(node.value)
        else:
            self.reader.note(name, called=False)

    def visit_Compare(self, node: ast.Compare) -> None:
        # `if self.pooler is not None` is no use of the pooler.
        if not isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.visit(target)

    def visit_For(self, node: ast.For) -> None:
        outer = self.reader.loop
        self.reader.loops += 1
        self.reader.loop = self.reader.loops
        self.visit(node.iter)
        self.visit_all([*node.body, *node.orelse])
        self.reader.loop = outer

    def _attribute_of_self(self, node: ast.AST) -> str | None:
        """`x` for `self.x`, `getattr(self, "x")` and `getattr(self, self.prefix)` with a class attribute `prefix`."""
        if isinstance(node, ast.Attribute) and self._is_self(node.value):
            return node.attr
        if _is_call_of(node, "getattr") and len(node.args) > 1 and self._is_self(node.args[0]):
            name = node.args[1]
            if isinstance(name, ast.Attribute) and self._is_self(name.value):
                value = getattr(self.reader.module_class, name.attr, None)
            else:
                value = getattr(name, "value", None)  # of a constant
            return value if isinstance(value, str) else None
        return None

    def _is_self(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self.self_name


def _is_call_of(node: ast.AST, function: str) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function
