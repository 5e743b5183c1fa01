"""Places in parameters that are scaled by their output channels."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from lrp_prune.engine.origins import Layout


class BiasPlace(NamedTuple):
    """A bias, or the part of one that belongs to a layer."""

    name: str
    layout: Layout


def shifted_in(bias: BiasPlace | None, pruned: Mapping[str, Tensor]) -> bool | Tensor:
    """Whether what is added to a layer's channels may change: there is something, and of the channel it is not pruned.

    Args:
        bias: of the layer.
        pruned: masks of biases of which some entries are.
    """
    if bias is None or bias.name not in pruned:
        return bias is not None
    return bias.layout.on(pruned[bias.name])


class Place(NamedTuple):
    """A weight, or the part of one that is used as a layer by itself: queries in a fused projection, an expert of a stack.

    Args:
        name: the parameter's.
        layout: of the part in it.
        axis: of the part, along which it has output channels (of a transposed convolution with groups those of one).
        bias: what is added to its channels, if that is a parameter.
        also: other weights that the same channels are the sum of: they get the same scale, and no shift.
    """

    name: str
    layout: Layout
    axis: int
    bias: BiasPlace | None
    also: tuple["Place", ...] = ()

    def along_weight(self, channels: Tensor, weight: Tensor) -> Tensor:
        """A value for each output channel in a shape that broadcasts to the weight."""
        if len(channels) != weight.shape[self.axis]:  # a transposed convolution, with its channels divided into groups
            rows, width = weight.shape[:2]
            groups = len(channels) // width
            table = channels.reshape(groups, 1, width).expand(-1, rows // groups, -1).reshape(rows, width)
            return table.reshape(rows, width, *(1,) * (weight.dim() - 2))
        return channels.reshape([len(channels) if dim == self.axis else 1 for dim in range(weight.dim())])
