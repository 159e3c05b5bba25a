"""The order of use that the source of a `forward` tells."""

from functools import cache

import torch
from torch import nn

from ulmfit_tools.forward_order import Use, uses_in_forward


def names(module_class: type) -> list[str]:
    return [use.name for use in uses_in_forward(module_class)]


class Nested(nn.Module):
    def forward(self, x):
        return self.outer(self.inner(x), scale=self.scale)


class Methods(nn.Module):
    base_model_prefix = "backbone"

    def _embed(self, x):
        return self.norm(self.embed(x))

    def forward(self, x):
        if self.pooler is not None:
            self.counter = len(self.layers)
        x = getattr(self, self.base_model_prefix)(self._embed(x))
        return self._embed(getattr(self, "head")(x))


class Child(Methods):
    def _embed(self, x):
        return self.own_embed(x)

    def forward(self, x):
        return self.last(super().forward(x))


class Loops(nn.Module):
    def forward(self, x):
        dtype = self.layers[0].weight.dtype
        for layer in self.layers:
            x = layer(x) + self.beside(x)
            for _ in range(2):
                x = self.deeper(x)
        return self.after(x.to(dtype))


class Recursive(nn.Module):
    def forward(self, x, depth=0):
        return self.first(x) if depth else self.forward(x, depth + 1)


def test_arguments_run_before_the_call():
    assert uses_in_forward(Nested) == (Use("inner", True, None), Use("scale", False, None), Use("outer", True, None))


def test_methods_are_read_where_they_are_called_and_once():
    # Comparing with None is no use; the value of an assignment comes before its target.
    assert names(Methods) == ["layers", "counter", "embed", "norm", "backbone", "head"]


def test_super_and_overridden_methods():
    assert names(Child) == ["layers", "counter", "own_embed", "backbone", "head", "last"]


def test_loops():
    assert uses_in_forward(Loops) == (
        Use("layers", False, None),
        Use("layers", False, 1),
        Use("beside", True, 1),
        Use("deeper", True, 2),
        Use("after", True, None),
    )


def test_recursion_ends():
    assert names(Recursive) == ["first"]


def test_decorated_forward_is_unwrapped():
    class Decorated(Nested):
        forward = cache(torch.no_grad()(Nested.forward))

    assert names(Decorated) == ["inner", "scale", "outer"]


def test_replaced_forward():
    class Patched(nn.Module): ...

    Patched.forward = function_outside_of_a_class
    assert names(Patched) == ["b", "a"]


def function_outside_of_a_class(module, x):
    return module.a(module.b(x))


def test_no_source_no_uses():
    namespace = {"nn": nn}
    exec("class Typed(nn.Module):\n    def forward(self, x):\n        return self.b(self.a(x))\n", namespace)
    assert uses_in_forward(namespace["Typed"]) == ()
    assert uses_in_forward(nn.ModuleDict) == ()  # has no forward
