"""A layer's weight and bias as the matrix that its inputs, with a one behind them, are multiplied with."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lrp_prune.pruning.compensation.wholes import Whole
from lrp_prune.pruning.places import Place


class Matrix:
    """A layer's weight, and its bias as the last column: ``[groups, out, in]``.

    Args:
        place: the layer's.
        wholes: its weight and its bias, by name.
        groups: of channels that know nothing of each other.
    """

    def __init__(self, place: Place, wholes: Mapping[str, Whole], groups: int) -> None:
        self._place, self._wholes, self._groups = place, wholes, groups
        self.has_bias = place.bias is not None
        self.kept = self._laid_out({name: whole.kept for name, whole in wholes.items()})

    @property
    def dense(self) -> Tensor:
        """The matrix of the dense model, in float32 at least."""
        laid_out = self._laid_out({name: whole.dense for name, whole in self._wholes.items()})
        return laid_out.to(torch.promote_types(laid_out.dtype, torch.float32))

    def _laid_out(self, tensors: Mapping[str, Tensor]) -> Tensor:
        matrix = self._upright(self._place.layout.on(tensors[self._place.name])).reshape(
            self._groups, -1, self._width()
        )
        if self._place.bias is None:
            return matrix
        bias = self._place.bias.layout.on(tensors[self._place.bias.name])
        return torch.cat([matrix, bias.reshape(self._groups, -1, 1)], dim=2)

    def _width(self) -> int:
        size = self._place.layout.size
        return int(torch.Size(size).numel()) // size[self._place.axis]

    def _upright(self, weight: Tensor) -> Tensor:
        """Output channels first."""
        return weight.movedim(self._place.axis, 0)

    @torch.no_grad()
    def write_(self, matrix: Tensor) -> None:
        """Write a matrix into the parameters."""
        if self._place.bias is not None:
            bias = self._place.bias.layout.on(self._wholes[self._place.bias.name].now)
            bias.copy_(matrix[..., -1].reshape(bias.shape))
            matrix = matrix[..., :-1]
        weight = self._upright(self._place.layout.on(self._wholes[self._place.name].now))
        weight.copy_(matrix.reshape(weight.shape))
        for whole in self._wholes.values():
            whole.write_()
