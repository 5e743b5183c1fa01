"""A shadow: for each entry of an activation, which unit it belongs to, and what is asked of its numbers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lrp_prune.engine.facts import Fact

NOTHING = 0
"""The number of entries that are constants, padding say."""
MIXED = -1
"""The number of entries that depend on more than one unit, or on none that is known."""

_LIKE = frozenset("type_as type to expand_as view_as reshape_as".split())
"""Functions of one tensor: a second one says which type or shape it is to have."""

_FACTS: dict[str, Fact["Shadow"]] = {space: Fact(f"shadow_{space}") for space in ("neuron", "head")}


class Shadow(NamedTuple):
    """Unit numbers of an activation's entries, int32, in a shape that broadcasts to it.

    ``zero`` says whether the entries of a unit are zero once all that the unit owns is zero.
    """

    numbers: Tensor
    zero: bool = True

    @property
    def known(self) -> bool:
        """Whether some entry belongs to a unit."""
        return bool((self.numbers > NOTHING).any())


Merge = Callable[[Tensor, Tensor], Tensor]
"""From the numbers of two operands of a sum or product, both of units, to the numbers of the result."""


class Call(NamedTuple):
    """A function that has just run: its name (without the underscore of those that work in place), kind and arguments."""

    name: str
    kind: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @property
    def outputs(self) -> list[Tensor | None]:
        """What it returned, None in the place of what is no tensor."""
        entries = list(self.result) if isinstance(self.result, tuple | list) else [self.result]
        return [entry if isinstance(entry, Tensor) else None for entry in entries]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments that the result is made of."""
        given = (self.args[:1], {}) if self.name in _LIKE else (self.args, self.kwargs)
        return [value for value in tree_flatten(given)[0] if isinstance(value, Tensor)]


def shadow_of(value: Any, space: str) -> Shadow | None:
    """The shadow of a tensor among the units of one kind (``space``), if it has one."""
    return _FACTS[space].of(value)


def cast_shadow(value: Any, space: str, shadow: Shadow | None) -> None:
    """Give a tensor its shadow, or take it away."""
    _FACTS[space].note(value, shadow)


def compact(numbers: Tensor) -> Tensor:
    """The same numbers with one entry along each dimension that repeats it by its stride."""
    for dim, (size, stride) in enumerate(zip(numbers.shape, numbers.stride(), strict=True)):
        if size > 1 and stride == 0:
            numbers = numbers.narrow(dim, 0, 1)
    return numbers


def alike(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the shape that they broadcast to."""
    both: tuple[Tensor, Tensor] = torch.broadcast_tensors(first, second)  # type: ignore[no-untyped-call]  # torch's
    return both


def distinct(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers that occur, in ascending order, and for each entry which of them it is."""
    found: tuple[Tensor, Tensor] = torch.unique(numbers, return_inverse=True)
    return found


def units_in(numbers: Tensor) -> Tensor:
    """The units that occur among numbers, in ascending order."""
    return distinct(numbers[numbers > NOTHING])[0]


def per_channel(shadow: Shadow, channels: int, dim: int) -> Tensor:
    """The number of each channel ``[channels]``, padding apart; :data:`MIXED` where it changes within the channel."""
    numbers = shadow.numbers
    apart = together(numbers, [axis for axis in range(numbers.dim()) if axis != dim % numbers.dim()])
    return apart.reshape(-1).expand(channels)


def together(numbers: Tensor, dims: Sequence[int]) -> Tensor:
    """The numbers with one entry along these dimensions: that of all of them, padding apart, or :data:`MIXED`."""
    for dim in dims:
        if numbers.shape[dim] > 1:
            high = numbers.amax(dim, keepdim=True)
            low = torch.where(numbers == NOTHING, high, numbers).amin(dim, keepdim=True)
            numbers = torch.where(low == high, high, MIXED)
    return numbers
