"""What a stage's layers are, in groups that read the same input, and what one of them gets."""

import weakref
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import TypeVar

from torch import Tensor

from lrp_prune.engine.call import Call
from lrp_prune.engine.forms import Convolution
from lrp_prune.engine.uses import Product
from lrp_prune.pruning.compensation.stages import StageReached
from lrp_prune.pruning.compensation.systems import rows_of
from lrp_prune.pruning.compensation.weighing import weights_of_rows
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.pairs import Part, PlacedUses, parts_of
from lrp_prune.pruning.places import Place
from lrp_prune.pruning.products import ComputedUses

Group = list[Place]
"""Layers that read the same input, and have one system."""


class Grouped(PlacedUses):
    """The layers of a stage, in groups that read the same input.

    Args:
        masks: what is pruned.
        groups: those that are known from earlier batches, which are added to.
        inside: names of the stage's parameters.
    """

    def __init__(self, masks: Masks, groups: list[Group], inside: Collection[str]) -> None:
        super().__init__(masks)
        self._groups, self._inside = groups, inside
        self._input: Callable[[], Tensor | None] = lambda: None  # not the tensor itself, which would hold its graph
        self._known = {place for group in groups for place in group}

    def _seen(self, part: Part, found: Product, result: Tensor) -> None:
        super()._seen(part, found, result)
        whole = len(part.place.layout.size) == 2 and part.rows is None
        shares = whole and found.activation is self._input()
        self._input = weakref.ref(found.activation) if whole else lambda: None
        if part.place in self._known or part.place.name not in self._inside:
            return
        self._known.add(part.place)
        if shares and self._groups:
            self._groups[-1].append(part.place)
        else:
            self._groups.append([part.place])


class Inputs(ComputedUses):
    """Shows what one layer gets, and leaves the forward after its last use, where that is known: what follows is not needed.

    Args:
        masks: what is pruned.
        place: the layer.
        uses: how often it is used in this forward; None to stay in it.
        counted: ``[samples, tokens]``, which are no padding; None for all.
        weights: of tokens, likewise; None where each counts for one.

    Raises:
        StageReached: out of the forward.
    """

    def __init__(
        self, masks: Masks, place: Place, uses: int | None, counted: Tensor | None, weights: Tensor | None = None
    ) -> None:
        super().__init__()
        self._masks, self._place, self._uses, self._counted = masks, place, uses, counted
        self._weights = weights
        self.rows: list[list[Tensor]] = []
        """Of each use, see :func:`rows_of`."""
        self.weights: list[Tensor | None] = []
        """Of each use, see :func:`weights_of_rows`."""
        self.unknown = False
        """Whether there was a use whose inputs cannot be laid out as rows."""

    def _made(self, call: Call, found: Product, result: Tensor) -> None:
        """Note what the layer's weight is multiplied with."""
        for part in parts_of(found, call, result, self._masks):
            if part.place == self._place:
                rows = rows_of(found, part, self._counted)
                self.unknown = self.unknown or rows is None
                self.rows.append(rows or [])
                self.weights.append(self._weights_of(found, part))
                if len(self.rows) == self._uses:
                    raise StageReached

    def _weights_of(self, found: Product, part: Part) -> Tensor | None:
        if self._weights is None or part.rows is not None:  # which tokens an expert gets, nobody knows here
            return None
        by_place = isinstance(found.form, Convolution)
        return weights_of_rows(self._weights, found.activation, self._counted, by_place)


_Entry = TypeVar("_Entry", bound=Hashable)


def merged(everyone: Sequence[Sequence[Sequence[_Entry]]]) -> list[list[_Entry]]:
    """The groups that several processes found, in one order that is the same in each of them.

    What only some have seen (an expert that few tokens reach) comes after what was before it there.

    Example:
        >>> merged([[["a", "b"], ["d"]], [["a"], ["c"], ["d"], ["e"]]])
        [['a', 'b'], ['c'], ['d'], ['e']]
    """
    result = [list(group) for group in everyone[0]]
    for theirs in everyone[1:]:
        behind = 0
        for group in theirs:
            known = {place: index for index, found in enumerate(result) for place in found}
            fresh = [place for place in group if place not in known]
            if len(fresh) == len(group):
                result.insert(behind, fresh)
                behind += 1
            else:
                index = known[next(place for place in group if place in known)]
                result[index] += fresh
                behind = index + 1
    return result
