"""Members: which entries of which parameters the units of a group own."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

NOBODY = -1
"""The owner of entries that no unit of the group owns."""


class Member:
    """The entries of one parameter that the units of a group own, entry by entry.

    Args:
        parameter: canonical name.
        owners: the unit that owns each entry, :data:`NOBODY` for none; integers in a shape that broadcasts to the
            parameter's: ``[1, in]`` for the columns of a linear layer, ``[out, 1]`` for its rows.
        reads: whether it is by these entries that a layer reads the units, and not what makes them.

    Example:
        >>> columns = Member("o_proj.weight", torch.tensor([[0, 0, 1, 1]]))  # two heads of two channels each
        >>> columns.kept(torch.tensor([True, False]))
        tensor([[ True,  True, False, False]])
        >>> columns
        Member('o_proj.weight', dim 1: 2 units of 2)
    """

    def __init__(self, parameter: str, owners: Tensor, reads: bool = False) -> None:
        self.parameter, self.owners, self.reads = parameter, owners.detach().to("cpu", torch.int32), reads

    @classmethod
    def of_slices(cls, parameter: str, shape: Sequence[int], dim: int, units: int, reads: bool = False) -> "Member":
        """Each of the units owns as many neighbouring indices along a dimension."""
        axes = [shape[dim] if axis == dim else 1 for axis in range(len(shape))]
        owners = torch.arange(units, dtype=torch.int32, device="cpu").repeat_interleave(shape[dim] // units)
        return cls(parameter, owners.reshape(axes), reads)

    @property
    def dim(self) -> int | None:
        """The only dimension along which the owner changes; None if there are several, or one unit owns all."""
        long = [axis for axis, size in enumerate(self.owners.shape) if size > 1]
        return long[0] if len(long) == 1 else None

    @property
    def width(self) -> int | None:
        """How many neighbouring indices along :attr:`dim` each unit owns, in the order of the units; None where they do not."""
        if self.dim is None:
            return 1 if self.owners.numel() == 1 else None
        owners = self.owners.reshape(-1)
        units = int(owners.max()) + 1
        width = len(owners) // max(units, 1)
        regular = torch.arange(units, dtype=torch.int32, device="cpu").repeat_interleave(width)
        return width if torch.equal(owners, regular) else None

    def kept(self, alive: Tensor) -> Tensor:
        """Which entries are kept when only the units that are ``alive`` (bool ``[units]``) are left.

        Returns:
            bool, in the shape of ``owners``.
        """
        known = torch.cat([alive.cpu(), torch.ones(1, dtype=torch.bool, device="cpu")])  # the last is that of nobody
        return known[self.owners.long()]

    def any_kept(self, mask: Tensor, units: int) -> Tensor:
        """Which units own an entry that a mask of the parameter's shape keeps: bool ``[units]``."""
        # Entries of one owner are brought together first, so that nothing of the parameter's size is made.
        for axis, size in enumerate(self.owners.shape):
            if size == 1 and mask.shape[axis] != 1:
                mask = mask.any(axis, keepdim=True)
        found = torch.zeros(units + 1, dtype=torch.bool, device="cpu")
        found[self.owners.expand(mask.shape)[mask.cpu()].long()] = True
        return found[:units]

    def to_list(self) -> list[Any]:
        """Plain values for JSON: name, shape, runs ``(first owner, width, number of owners)``, and whether it reads."""
        runs = [list(run) for run in _runs(self.owners.reshape(-1).tolist())]
        return [self.parameter, list(self.owners.shape), runs, self.reads]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> "Member":
        """The member that :meth:`to_list` described."""
        parameter, shape, runs, reads = values
        pieces = [
            torch.arange(first, first + number, dtype=torch.int32, device="cpu").repeat_interleave(width)
            for first, width, number in runs
        ]
        return cls(parameter, torch.cat(pieces).reshape(shape), reads)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Member)
            and (self.parameter, self.reads) == (other.parameter, other.reads)
            and torch.equal(self.owners, other.owners)
        )

    __hash__ = None  # type: ignore[assignment]  # compared by value

    def __repr__(self) -> str:
        units = int(self.owners.max()) + 1
        where = "" if self.dim is None else f", dim {self.dim}"
        width = "" if self.width is None else f" of {self.width}"
        return f"Member({self.parameter!r}{where}: {units} units{width})"


def stacked_layers(members: Sequence[Member], units: int) -> int:
    """How many layers a group of units is of: those of a stack (the experts of a mixture) have their units one after the other.

    Example:
        >>> stacked_layers([Member("down_proj", torch.arange(6).reshape(2, 1, 3), reads=True)], 6)
        2
    """
    for member in members:
        layers = member.owners.shape[0] if member.owners.dim() > 1 else 1
        width = units // max(layers, 1)
        regular = layers > 1 and width > 1 and member.owners.numel() == units == layers * width
        if regular and torch.equal(member.owners.reshape(-1).long(), torch.arange(units, device="cpu")):
            return int(layers)
    return 1


def _runs(owners: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """Neighbouring entries as ``(first owner, width, number)``: each owner ``width`` times, the next one higher by one."""
    blocks: list[list[int]] = []  # owner, width
    for owner in owners:
        if blocks and blocks[-1][0] == owner:
            blocks[-1][1] += 1
        else:
            blocks.append([owner, 1])
    start = 0
    while start < len(blocks):
        first, width = blocks[start]
        stop = start + 1
        while stop < len(blocks) and blocks[stop] == [first + stop - start, width] and first != NOBODY:
            stop += 1
        yield first, width, stop - start
        start = stop
