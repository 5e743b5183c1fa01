"""Products as a forward makes them through which nothing goes back: computed without a graph, shown, and given on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lrp_prune.engine.call import Call
from lrp_prune.engine.uses import Product, WeightUses


class ComputedUses(WeightUses):
    """Computes each product of a weight and an activation by itself, and shows it."""

    def __init__(self) -> None:
        super().__init__(lambda use: [])

    def observed(self, call: Call) -> Any:
        """Run a product; None where a call is none."""
        found = self._product(call)
        if found is None:
            return None
        within = self.saving.everything
        result = self._already(found)
        if result is None or within:
            made = with_graph(found) if within else computed(found)
            result = made if result is None else made - made.detach() + result
        self._made(call, found, result)
        return result if within else given(found.activation, lambda: result)

    def _already(self, found: Product) -> Tensor | None:
        """The product, if it need not be computed; None where it has to be."""
        return None

    def _made(self, call: Call, found: Product, result: Tensor) -> None:
        """A product is there, and may be changed in place before the model goes on with it."""


def computed(found: Product) -> Tensor:
    """The product, as a tensor of its own and without a graph: nothing has to go back through it."""
    with torch.no_grad():
        return with_graph(found)


def with_graph(found: Product) -> Tensor:
    """The product, as a tensor of its own."""
    result = found.form.forward(found.activation, found.weight)
    return result.clone() if result._is_view() else result


class _Given(Function):
    """A value that is computed from an activation, and through which nothing has to go back.

    It comes out of a function, since autograd takes what goes in and comes out as it is for a view, which nobody may write into.
    """

    @staticmethod
    def forward(ctx: Any, activation: Tensor, value: Callable[[], Tensor]) -> Tensor:
        return value()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


given: Callable[..., Tensor] = _Given.apply
