"""The layers of a stage in groups that read the same input, which have one system of sums."""

import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import TypeVar

from torch import Tensor

from lrp_prune.engine.call import Call
from lrp_prune.engine.uses import Product
from lrp_prune.pruning.choices import Choices
from lrp_prune.pruning.compensation.repeating import Seen
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.pairs import Part, PlacedUses
from lrp_prune.pruning.places import Place

Group = list[Place]
"""Layers that read the same input, and have one system."""


class Grouped(PlacedUses):
    """The layers of a stage, in groups that read the same input.

    Args:
        masks: what is pruned.
        groups: those that are known from earlier batches, which are added to.
        inside: names of the stage's parameters.
        told: is shown each use of the first of a group.
        choices: that the forward makes.
    """

    def __init__(
        self, masks: Masks, groups: list[Group], inside: Collection[str], told: Callable[[Part, Product], object],
        choices: Choices,
    ) -> None:  # fmt: skip
        super().__init__(masks)
        self._choices = choices
        self._groups, self._inside, self._told = groups, inside, told
        self._known = {place for group in groups for place in group}
        self._first = {group[0] for group in groups}
        self.products: list[Seen] = []
        """All products of the forward, those of layers that masks are about among them."""
        # Not the tensor itself, which would hold its graph, and how often it was written into.
        self._input: tuple[Callable[[], Tensor | None], int] = (lambda: None, 0)

    def _made(self, call: Call, found: Product, result: Tensor) -> None:
        read, version = self._input
        same = found.activation is read() and found.activation._version == version
        number = self.products[-1].read + (not same) if self.products else 0
        self._input = (weakref.ref(found.activation), found.activation._version)
        self.products.append(Seen(found.origin.name, found.activation.shape, number, len(self._choices.made), []))
        super()._made(call, found, result)

    def _seen(self, part: Part, found: Product, result: Tensor) -> None:
        super()._seen(part, found, result)
        self.products[-1].parts.append(part)
        if part.place.name not in self._inside:
            return
        if part.place not in self._known:
            self._known.add(part.place)
            group = self._group_of(part)
            if group is not None:
                group.append(part.place)
            else:
                self._groups.append([part.place])
                self._first.add(part.place)
        if part.place in self._first:
            self._told(part, found)

    def _group_of(self, part: Part) -> Group | None:
        """The group of a layer that read the same right before; None where there is none, or one of the two reads a part."""
        now = self.products[-1]
        for seen in reversed(self.products[:-1]) if _is_whole(part) else ():
            if seen.read != now.read:
                break
            for other in filter(_is_whole, seen.parts):
                return next((group for group in self._groups if other.place in group), None)
        return None


def _is_whole(part: Part) -> bool:
    return part.rows is None and len(part.place.layout.size) == _MATRIX


_MATRIX = 2
"""Dimensions of a weight that may share its input's products with others."""


def reading_otherwise(group: Group, forwards: Iterable[Sequence[Seen]]) -> list[Place]:
    """The layers of a group that do not read, use by use, what its first one reads: they have systems of their own."""
    found = list[Place]()
    for products in forwards:
        reads = {
            place: [seen.read for seen in products if any(part.place == place for part in seen.parts)]
            for place in group
        }
        found += [place for place in group if reads[place] != reads[group[0]]]
    return list(dict.fromkeys(found))


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
