"""Products that come out as in an earlier run of the same batch: kept, and given again in place of being computed.

While the layers of a stage are solved for one after the other, the model's own code is run once for each, and what comes before
a layer that is still to be changed gives in every run what it gave in the one before.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrp_prune.engine.call import Call
from lrp_prune.engine.uses import Product
from lrp_prune.pruning.pairs import Part
from lrp_prune.pruning.places import Place
from lrp_prune.pruning.products import ComputedUses


class Seen(NamedTuple):
    """A product of a forward.

    Args:
        name: of the parameter.
        size: of the activation.
        read: the number of its input: products in a row that read the same have the same one.
        choices: how many choices were made before it, see :class:`Choices`.
        parts: of the outputs, those of layers that masks are about.
    """

    name: str
    size: torch.Size
    read: int
    choices: int
    parts: list[Part]

    def is_of(self, found: Product) -> bool:
        """Whether another forward's product is the same one."""
        return self.name == found.origin.name and self.size == found.activation.shape


def settled(products: Sequence[Seen], changing: Collection[Place], choosing: bool = False) -> int:
    """How many products, from a forward's first on, come out as before.

    Args:
        products: of the forward.
        changing: layers that are still to be changed.
        choosing: whether it makes its own choices, and not those of the forwards before.
    """
    places = set(changing)
    for index, seen in enumerate(products):
        if any(part.place in places for part in seen.parts) or (choosing and seen.choices):
            return index
    return len(products)


class Results:
    """What products of one batch's forward gave, on the CPU.

    Args:
        room: tells how many bytes may be kept.
    """

    def __init__(self, room: Callable[[], int]) -> None:
        self._room = room
        self._kept: dict[int, Tensor] = {}

    def keep(self, index: int, result: Tensor) -> None:
        """Keep a product's result for later runs, if there is room."""
        if index not in self._kept and result.nbytes <= self._room() - self.nbytes:
            self._kept[index] = result.detach().to("cpu", copy=True)

    def given(self, index: int, last: bool) -> Tensor | None:
        """A result, which the model may write into; None where it is not there. After the last time it is forgotten."""
        if last:
            return self._kept.pop(index, None)
        kept = self._kept.get(index)
        return None if kept is None else kept.clone()

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return sum(result.nbytes for result in self._kept.values())


class RepeatedUses(ComputedUses):
    """Products of a forward, of which those that come out as before are given again.

    Args:
        products: of an earlier forward; from where this one runs otherwise, everything is computed.
        results: of earlier forwards of the same batch; None to compute everything.
        settled: how many of the products, from the first, come out the same in this forward and all later ones.
        last: whether there is no later one.
    """

    def __init__(
        self, products: Sequence[Seen] = (), results: Results | None = None, settled: int = 0, last: bool = False
    ) -> None:
        super().__init__()
        self._products, self._results, self._last = products, results, last
        self._settled = settled if results is not None else 0
        self._index = -1

    @property
    def seen(self) -> Seen | None:
        """The product at hand as an earlier forward had it; None where this one runs otherwise."""
        return self._products[self._index] if self._index < len(self._products) else None

    def _already(self, found: Product) -> Tensor | None:
        self._index += 1
        if self.seen is None or not self.seen.is_of(found):
            self._products = ()
            return None
        if self._index >= self._settled or self._results is None:
            return None
        return self._results.given(self._index, self._last)

    def _made(self, call: Call, found: Product, result: Tensor) -> None:
        """Keep what later forwards make again."""
        if self.seen is not None and self._index < self._settled and self._results is not None and not self._last:
            self._results.keep(self._index, result)
