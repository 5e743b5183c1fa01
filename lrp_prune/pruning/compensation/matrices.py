"""A layer's weight and bias as the matrix that its inputs, with a one behind them, are multiplied with."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.places import Place


class Matrix:
    """A layer's weight, and its bias as the last column: ``[groups, out, in]``.

    Args:
        place: the layer's.
        parameters: of the model, by name.
        masks: what is pruned.
        groups: of channels that know nothing of each other.
    """

    def __init__(self, place: Place, parameters: Mapping[str, nn.Parameter], masks: Masks, groups: int) -> None:
        self._place, self._parameters, self._groups = place, parameters, groups
        self.has_bias = place.bias is not None
        self.kept = self._laid_out({name: kept_of(masks, name, parameters[name]) for name in self._names()})

    def _names(self) -> list[str]:
        return [self._place.name, *([self._place.bias.name] if self._place.bias is not None else [])]

    def values(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The matrix of other values of the parameters, in float32 at least."""
        laid_out = self._laid_out(tensors)
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
            bias = self._place.bias.layout.on(self._parameters[self._place.bias.name].data)
            bias.copy_(matrix[..., -1].reshape(bias.shape))
            matrix = matrix[..., :-1]
        weight = self._upright(self._place.layout.on(self._parameters[self._place.name].data))
        weight.copy_(matrix.reshape(weight.shape))


def kept_of(masks: Masks, name: str, parameter: Tensor) -> Tensor:
    """What is kept of a parameter, laid out as it is."""
    kept = torch.empty_strided(parameter.shape, parameter.stride(), dtype=torch.bool, device=parameter.device)
    return kept.copy_(masks[name]) if name in masks else kept.fill_(True)
