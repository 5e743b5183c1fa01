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
        inputs = self._per_sample(name)
        if name in self._shardings and name + INPUTS not in self._shardings:
            inputs = self._shardings[name].part(inputs)  # a vector, which is whole in each process
        mean = self._means.get(name)
        shares = inputs.sqrt() / ((self._mean(name) if mean is None else mean) or 1.0)
        return shares if index is None else _broadcast(shares, shape, index)

    def _per_sample(self, name: str) -> Tensor:
        return self.inputs[name].to(torch.float32) / self._num_samples

    def _mean(self, name: str) -> float:
        contributions = self.mean_weights[name] * self._per_sample(name).sqrt()
        sharding = self._shardings.get(name + INPUTS) or Sharding(tuple(contributions.shape))
        return float(sharding.all_reduced(contributions.sum(dtype=torch.float64))) / max(sharding.numel, 1)


def _broadcast(tensor: Tensor, shape: torch.Size, index: slice) -> Tensor:
    """``tensor.expand(shape).flatten()[index]`` without making the whole."""
    tensor = tensor.contiguous()
    flat = torch.arange(*index.indices(shape.numel()), device=tensor.device)
    position = torch.zeros_like(flat)
    for dim in range(len(shape)):
        if tensor.shape[dim] > 1:
            position += flat.div(shape[dim + 1 :].numel(), rounding_mode="floor").remainder_(
                shape[dim]
            ) * tensor.stride(dim)
    return tensor.reshape(-1)[position]
