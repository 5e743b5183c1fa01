"""The log-likelihood of labels, and its gradient, without a second and third copy of the logits.

With a vocabulary of 50 000 and more the logits are the largest tensor of a language model's forward. ``cross_entropy`` keeps
its softmax beside them and makes two more of their size in backward, and slicing for the shift one more.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lrp_prune.models.batches import IGNORED

_BLOCK = 2**20
"""Entries that are worked on at a time: 4 MB in float32."""


class _LogLikelihood(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        log_normalizer = torch.empty(len(logits), dtype=_wide(logits), device=logits.device)
        for rows in _blocks(logits):
            log_normalizer[rows] = logits[rows].to(log_normalizer.dtype).logsumexp(-1)
        counted = labels != IGNORED
        chosen = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0].to(log_normalizer.dtype)
        ctx.save_for_backward(logits, labels, log_normalizer)
        return torch.where(counted, chosen - log_normalizer, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, labels, log_normalizer = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            counted = (labels != IGNORED).to(log_normalizer.dtype)
            result = torch.empty_like(logits)
            for rows in _blocks(logits):
                block = logits[rows].to(log_normalizer.dtype, copy=True)
                block.sub_(log_normalizer[rows, None]).exp_().mul_(-counted[rows, None] * gradient)
                result[rows] = block
            ones = (counted * gradient).to(result.dtype)
            result.scatter_add_(1, labels.clamp(min=0)[:, None], ones[:, None])
        return result, None


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    r""":math:`\sum_t \log \mathrm{softmax}(z_t)_{y_t}` over the positions whose label is not :data:`IGNORED`.

    Args:
        logits: ``z``, ``[..., vocabulary]``, floating point; sums are taken in float32 at least.
        labels: ``y``, ``[...]``, integers.

    Returns:
        A scalar. Its gradient is a single tensor of the logits' size; second derivatives are not defined.

    Example:
        >>> log_likelihood(torch.zeros(1, 3, 4), torch.tensor([[0, 2, -100]]))  # 2 log(1/4)
        tensor(-2.7726)
    """
    function: Callable[[Tensor, Tensor], Tensor] = _LogLikelihood.apply
    return function(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).to(logits.device))


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _blocks(logits: Tensor) -> Iterator[slice]:
    size = max(1, _BLOCK // max(1, logits.shape[1]))
    return (slice(start, start + size) for start in range(0, len(logits), size))
