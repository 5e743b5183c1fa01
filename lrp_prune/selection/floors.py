"""A floor for each tensor: where all weights are ranked together, none loses far more than the average.

One ranking of all weights takes where it finds least, and can take a whole layer: behind a saturated output, say, the queries
and keys of attention have next to no relevance together, and the model falls to chance without them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Protocol

from torch import Tensor

DEFAULT = 0.5
"""The share of the average density that each tensor keeps, where nothing else is asked for."""


def resolved_floor(floor: float | None, scope: str, granularity: str) -> float:
    """The floor that is meant: by default :data:`DEFAULT` where all weights are compared, and none elsewhere.

    Raises:
        ValueError: if it is no fraction in [0, 1], or a scope or granularity has none.

    Example:
        >>> resolved_floor(None, "global", "weight"), resolved_floor(None, "row", "weight"), resolved_floor(0, "global", "weight")
        (0.5, 0.0, 0.0)
    """
    if floor is None:
        return DEFAULT if (scope, granularity) == ("global", "weight") else 0.0
    if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor <= 1:
        raise ValueError(f"floor must be None or a number in [0, 1], got {floor!r}")
    if floor and scope != "global":
        raise ValueError(
            f"floor={floor:g} is for scope 'global': scope {scope!r} prunes each tensor alike, leave it out"
        )
    if floor and granularity != "weight":
        raise ValueError(
            f"floor={floor:g} is for granularity 'weight', not for {granularity!r}: leave it out, or use scope='layer'"
        )
    return float(floor)


def limits_of(sizes: Mapping[str, int], floor: float, number: int, before: Mapping[str, int]) -> dict[str, int]:
    r"""How many entries of each tensor may be pruned: :math:`\lceil n (1 - f (1 - k / N)) \rceil`, or what is pruned already.

    The limits of all tensors together are never less than ``number``.

    Args:
        sizes: :math:`n`, entries of each tensor; :math:`N` of all.
        floor: :math:`f`, the share that a tensor keeps of what it would keep if all were pruned alike.
        number: :math:`k`, to be pruned of all.
        before: how many entries are pruned already, where some are.

    Example:
        >>> sizes = {"large": 900, "small": 100}
        >>> limits_of(sizes, 0.5, 600, {}), limits_of(sizes, 1.0, 600, {"small": 95})
        ({'large': 720, 'small': 80}, {'large': 540, 'small': 95})
    """
    # Exact, with the floor as it is written: rounding could make the sum of the limits too small.
    density = 1 - Fraction(number, max(sum(sizes.values()), 1))
    share = 1 - Fraction(str(float(floor))) * density
    return {name: max(math.ceil(entries * share), before.get(name, 0)) for name, entries in sizes.items()}


class Choice(Protocol):
    """Entries that one ranking prunes."""

    @property
    def pruned(self) -> Mapping[str, int]:
        """How many of each tensor."""

    def masks(self) -> Mapping[str, Tensor]:
        """The packed masks of what is kept."""


def within_limits(
    names: Sequence[str],
    number: int,
    limits: Mapping[str, int],
    choose: Callable[[Sequence[str], int], Choice],
) -> dict[str, Tensor]:
    """Masks that prune ``number`` entries of all tensors, the first of their ranking, and of none more than its limit.

    Tensors that one ranking of all would take beyond their limit are pruned to it by their own ranking, and what is left to
    prune is chosen anew from the others, until none is beyond. As the others can only lose more by that, a tensor that once
    was beyond its limit stays there: the result is that of going through the ranking of all, past each tensor that is full.

    Args:
        names: of the tensors.
        number: to be pruned, at most the sum of the limits.
        limits: of each tensor, at least what is pruned of it already.
        choose: from names and a number to what prunes this number of them together.

    Example:
        >>> import torch
        >>> from lrp_prune.selection import bits
        >>> from lrp_prune.selection.together import smallest_of
        >>> from lrp_prune.relevance import Relevance
        >>> values = Relevance({"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([5.0, 6.0, 7.0, 8.0])})
        >>> def choose(names, number):
        ...     return smallest_of(values, names, number, "absolute")
        >>> def count(masks):
        ...     return {name: 4 - bits.count(mask) for name, mask in masks.items()}
        >>> choose(["a", "b"], 4).pruned, count(within_limits(["a", "b"], 4, {"a": 3, "b": 3}, choose))
        ({'a': 4, 'b': 0}, {'a': 3, 'b': 1})
    """
    full: dict[str, Tensor] = {}
    left = list(names)
    while left:
        choice = choose(left, number)
        beyond = [name for name in left if choice.pruned[name] > limits[name]]
        if not beyond:
            return {**full, **choice.masks()}
        for name in beyond:
            full.update(choose([name], limits[name]).masks())
        number -= sum(limits[name] for name in beyond)
        left = [name for name in left if name not in full]
    return full
