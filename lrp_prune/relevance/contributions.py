r"""What weights contribute to their layers' outputs, :math:`|W_{ji}| \, \|a_i\|_2`: the second factor of ``geometric``."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lrp_prune.distributed.sharding import Sharding

INPUTS = "::inputs"
"""Ends the name of a tensor's ``inputs`` among a relevance's sums and shardings."""


class Contributions:
    """The inputs of weights, and the mean contribution in each tensor.

    Args:
        inputs: sums over samples and tokens of the squares of what each weight multiplies, in shapes that broadcast to
            the weights' (to what this process holds of them, where the name with :data:`INPUTS` is among the shardings).
        mean_weights: the mean absolute weight for each of the ``inputs``.
        num_samples: samples in ``inputs``.
        shardings: how the weights, and inputs as large as they, are divided among processes.
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        mean_weights: Mapping[str, Tensor],
        num_samples: int,
        shardings: Mapping[str, Sharding],
    ) -> None:
        self.inputs, self.mean_weights = dict(inputs), dict(mean_weights)
        self._num_samples, self._shardings = num_samples, shardings
        # Reading must not need other processes, so what does is done now.
        self._means = {name: self._mean(name) for name in self.inputs if name in shardings}

    def shares(self, name: str, shape: torch.Size, index: slice | None) -> Tensor:
        r""":math:`\|a\|_2` over the mean contribution in the tensor, per sample, so that a share is the weight times this.

        Args:
            name: the weight's.
            shape: of the weight, or of what this process holds of it.
            index: a slice of the flattened weight, for which a vector is returned; None: what broadcasts to ``shape``.
        """
        inputs = self.inputs[name]
        if name in self._shardings and name + INPUTS not in self._shardings:
            inputs = self._shardings[name].part(inputs)  # a vector, which is whole in each process
        if index is not None:
            inputs = _broadcast(inputs, shape, index)
        return (inputs.to(torch.float32) / self._num_samples).sqrt_() / (self._mean_of(name) or 1.0)

    def _mean_of(self, name: str) -> float:
        if name not in self._means:
            self._means[name] = self._mean(name)
        return self._means[name]

    def _mean(self, name: str) -> float:
        inputs = self.inputs[name].to(torch.float32) / self._num_samples
        contributions = self.mean_weights[name] * inputs.sqrt()
        sharding = self._shardings.get(name + INPUTS) or Sharding(tuple(contributions.shape))
        return float(sharding.all_reduced(contributions.sum(dtype=torch.float64))) / max(sharding.numel, 1)


def _broadcast(tensor: Tensor, shape: torch.Size, index: slice) -> Tensor:
    """``tensor.expand(shape).flatten()[index]`` without making the whole."""
    tensor, (start, stop, step) = tensor.contiguous(), index.indices(shape.numel())
    leading = _leading(tensor.shape, shape)
    width = shape[leading:].numel()
    if step != 1 or not leading or stop <= start:
        chosen = torch.arange(start, max(start, stop), step, device=tensor.device)
        return tensor.reshape(-1)[_positions(tensor, shape, chosen)]
    rows = torch.arange(start // width, -(-stop // width), device=tensor.device)
    table = tensor.reshape(
        -1, tensor.shape[leading:].numel()
    )  # a row has all of a row's entries, or one for all of them
    rows = _positions(tensor, shape[:leading], rows) // table.shape[1]
    first, last = start % width, (stop - 1) % width + 1
    if len(rows) == 1:
        return table[rows[0]].expand(width)[first:last].clone()
    ends = table[rows[0]].expand(width)[first:], table[rows[-1]].expand(width)[:last]
    return torch.cat([ends[0], table[rows[1:-1]].expand(-1, width).reshape(-1), ends[1]])


def _leading(own: torch.Size, shape: torch.Size) -> int:
    """Dimensions before the last ones that a tensor has in full, or along all of which it has one entry."""
    full = one = len(shape)
    while full and own[full - 1] == shape[full - 1]:
        full -= 1
    while one and own[one - 1] == 1:
        one -= 1
    return min(full, one)


def _positions(tensor: Tensor, shape: torch.Size, flat: Tensor) -> Tensor:
    """Where in a contiguous tensor is what an expanded one has at these places of its first dimensions, in this shape."""
    position = torch.zeros_like(flat)
    for dim in range(len(shape)):
        if tensor.shape[dim] > 1:
            rest = flat.div(shape[dim + 1 :].numel(), rounding_mode="floor")
            position += rest.remainder_(shape[dim]) * tensor.stride(dim)
    return position
