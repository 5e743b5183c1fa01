"""Parameters of several layers in one: which unit each channel of each of them belongs to."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lrp_prune.relevance.members import NOBODY, Member
from lrp_prune.shrinking.units import Group


class Grouped(NamedTuple):
    """A convolution in groups: units of its rows, and of the channels that a group has along the other axis.

    Args:
        rows: ``(group of units, unit)`` of each row, int ``[groups, rows of a group, 2]``; -1 where there is no unit.
        width: of the channels of each group, int ``[groups, width, 2]``.
    """

    rows: Tensor
    width: Tensor


class Stack(NamedTuple):
    """Layers of one size that are stacked in one parameter, as the experts of a mixture.

    Args:
        axis: along which each has channels.
        units: ``(group of units, unit)`` of each channel, int ``[layers, channels, 2]``; -1 where there is no unit.
    """

    axis: int
    units: Tensor

    def sets(self, index: int, units: int) -> list[Tensor]:
        """Which units of a group each layer has, bool ``[units]``."""
        found = []
        for layer in self.units:
            row = torch.zeros(units, dtype=torch.bool, device="cpu")
            row[layer[layer[:, 0] == index][:, 1]] = True
            found.append(row)
        return found


def grouped_of(
    groups: Sequence[Group], parameters: Mapping[str, Tensor], owners: Mapping[str, nn.Module]
) -> dict[str, Grouped]:
    """The convolutions in groups, by the name of their weight."""
    found = {}
    for name in {member.parameter for group in groups for member in group.members}:
        layer = owners[name]
        if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1 and parameters[name] is layer.weight:
            shape = tuple(layer.weight.shape)
            table = Grouped(
                torch.full((shape[0], 1, 2), NOBODY, device="cpu"),
                torch.full((shape[0], shape[1], 2), NOBODY, device="cpu"),
            )
            passes = shape[0] == layer.groups and shape[1] == 1
            for index, group in enumerate(groups):
                for member in group.members:
                    if member.parameter == name:
                        along_width = passes or member.reads != layer.transposed
                        _note(table.width if along_width else table.rows, index, member)
                        if passes:
                            _note(table.rows, index, member)
            rows = table.rows.reshape(layer.groups, -1, 2)
            width = table.width.reshape(layer.groups, -1, shape[1], 2)[:, 0]
            found[name] = Grouped(rows, width)
    return found


def stacks_of(groups: Sequence[Group], parameters: Mapping[str, Tensor], grouped: Collection[str]) -> dict[str, Stack]:
    """The parameters that hold several layers which have units of their own each, by name."""
    found: dict[str, Stack] = {}
    for index, group in enumerate(groups):
        for member in group.members:
            long = [axis for axis, size in enumerate(member.owners.shape) if size > 1]
            if member.dim is not None or member.parameter in grouped or len(long) != 2 or long[0] != 0:
                continue
            axis, shape = long[1], parameters[member.parameter].shape
            table = found.setdefault(
                member.parameter, Stack(axis, torch.full((shape[0], shape[axis], 2), NOBODY, device="cpu"))
            )
            if table.axis == axis:
                owners = member.owners.reshape(shape[0], shape[axis])
                _note(table.units, index, Member(member.parameter, owners, member.reads))
    return found


def _note(table: Tensor, index: int, member: Member) -> None:
    owners = member.owners.flatten(2)[:, :, 0] if member.owners.dim() > 2 else member.owners
    owners = owners.expand(table.shape[:2]).long()
    mine = owners != NOBODY
    table[..., 0][mine] = index
    table[..., 1][mine] = owners[mine]
