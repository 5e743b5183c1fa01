r"""How likely labels are, and its gradient, without a second and third copy of the logits.

With a vocabulary of 50 000 and more the logits are the largest tensor of a language model's forward. ``cross_entropy`` keeps
its softmax beside them and makes two more of their size in backward, and slicing for the shift one more.

With the label's log-odds :math:`m = z_y - \log \sum_{k \ne y} e^{z_k}` and its probability :math:`p = \sigma(m)`, a position is
worth

.. math:: (1 - \lambda) \log p + \lambda \log \frac{p}{1 - p}, \qquad
    \frac{\partial}{\partial m} = (1 - \lambda) (1 - p) + \lambda

The slope of the log-probability, :math:`1 - p`, vanishes where the label is predicted and is largest where nothing can predict
it: of a model that is sure of all but the first token, relevance is that of the first token, and what makes the others is pruned.
In log-odds all positions count alike, as samples do in the logit of a class, however sure a model is. A quarter of them is enough
for that, and changes little on a language model that is hardly ever sure.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lrp_prune.models.batches import IGNORED

_BLOCK = 2**20
"""Entries that are worked on at a time: 4 MB in float32."""


ODDS = 0.25
"""The share of log-odds by default."""


class _Likelihood(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, odds: float) -> Tensor:
        others = torch.empty(len(logits), dtype=_wide(logits), device=logits.device)
        at = labels.clamp(min=0)[:, None]
        for rows in _blocks(logits):
            block = logits[rows].to(others.dtype, copy=True)
            others[rows] = block.scatter_(1, at[rows], -torch.inf).logsumexp(-1)
        rivals = others > -torch.inf
        others.masked_fill_(~rivals, 0.0)
        counted = rivals & (labels != IGNORED)  # the only label that is possible at all says nothing
        margin = logits.gather(1, at)[:, 0].to(others.dtype) - others
        slope = torch.where(counted, (1 - odds) * (-margin).sigmoid() + odds, 0.0)
        ctx.save_for_backward(logits, labels, others, slope)
        return torch.where(counted, _value(margin, odds), 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, others, slope = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            slope = slope * gradient
            result = torch.empty_like(logits)
            for rows in _blocks(logits):
                block = logits[rows].to(others.dtype, copy=True)
                result[rows] = block.sub_(others[rows, None]).exp_().mul_(-slope[rows, None])
            result.scatter_(1, labels.clamp(min=0)[:, None], slope.to(result.dtype)[:, None])
        return result, None, None


def _value(margin: Tensor, odds: float) -> Tensor:
    return (1 - odds) * F.logsigmoid(margin) + (odds * margin if odds else 0.0)


def checked_odds(odds: float) -> float:
    """A share of log-odds.

    Raises:
        ValueError: for one that is not between 0 and 1.
    """
    if not isinstance(odds, int | float) or isinstance(odds, bool) or not 0 <= odds <= 1:
        raise ValueError(f"odds, the share of log-odds, must be a number between 0 and 1, got {odds!r}")
    return float(odds)


def likelihood(logits: Tensor, labels: Tensor, odds: float) -> Tensor:
    r"""How likely labels are, summed over the positions whose label is not :data:`IGNORED`.

    Args:
        logits: ``z``, ``[..., vocabulary]``, floating point; sums are taken in float32 at least.
        labels: ``y``, ``[...]``, integers.
        odds: the share of log-odds; 0 for :math:`\sum_t \log p_t`.

    Returns:
        A scalar. Its gradient is a single tensor of the logits' size; second derivatives are not defined.

    Raises:
        ValueError: for a share that is not between 0 and 1.

    Example:
        >>> likelihood(torch.zeros(1, 3, 4), torch.tensor([[0, 2, -100]]), 1)  # 2 log(1/3)
        tensor(-2.1972)
    """
    function: Callable[[Tensor, Tensor, float], Tensor] = _Likelihood.apply
    return function(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).to(logits.device), checked_odds(odds))


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    r""":math:`\sum_t \log \mathrm{softmax}(z_t)_{y_t}`, as :func:`likelihood` without log-odds.

    Example:
        >>> log_likelihood(torch.zeros(1, 3, 4), torch.tensor([[0, 2, -100]]))  # 2 log(1/4)
        tensor(-2.7726)
    """
    return likelihood(logits, labels, 0)


def soft_likelihood(logits: Tensor, shares: Tensor, odds: float) -> Tensor:
    r"""How likely all classes are, each by its share: :math:`\sum_{t, c} y_{t c} f(p_{t c})`.

    Args:
        logits: ``[..., classes]``.
        shares: ``y``, of the same shape.
        odds: as for :func:`likelihood`.

    Raises:
        ValueError: for a share that is not between 0 and 1.

    Example:
        >>> soft_likelihood(torch.zeros(1, 4), torch.tensor([[0.5, 0.5, 0.0, 0.0]]), 0)  # log(1/4)
        tensor(-1.3863)
    """
    sure = 1 - torch.finfo(_wide(logits)).eps
    log_p = logits.to(_wide(logits)).log_softmax(-1)
    values = _value(log_p - (-log_p.exp().clamp(max=sure)).log1p(), checked_odds(odds))
    return (shares.to(values) * values).sum()


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _blocks(logits: Tensor) -> Iterator[slice]:
    size = max(1, _BLOCK // max(1, logits.shape[1]))
    return (slice(start, start + size) for start in range(0, len(logits), size))
