"""How far a model's next-token distributions are from those of the model it was made from."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def next_token_divergence(logits: Tensor, base_logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Summed divergence of next-token distributions, and how many positions there are.

    :math:`\sum_t \mathrm{KL}(p_t^{\mathrm{base}} \,\|\, p_t) = \sum_t \sum_v p_t^{\mathrm{base}}(v)
    (\log p_t^{\mathrm{base}}(v) - \log p_t(v))`, in nats.

    Args:
        logits: of the model, ``[batch, tokens, vocabulary]``, of any floating-point type; computed in float32.
        base_logits: of the base model, of the same shape.
        mask: 1 for positions that count, ``[batch, tokens]``; None for all.

    Returns:
        A float64 scalar and an int64 one.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.dim() != 3 or logits.shape != base_logits.shape or (mask is not None and mask.shape != logits.shape[:2]):
        raise ValueError(
            f"both logits must be [batch, tokens, vocabulary] and the mask [batch, tokens], got {tuple(logits.shape)}, "
            f"{tuple(base_logits.shape)} and {None if mask is None else tuple(mask.shape)}"
        )
    counted = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if mask is None else mask.bool()
    total = logits.new_zeros((), dtype=torch.float64)
    for row, base_row, rows in zip(logits, base_logits, counted, strict=True):
        base = base_row[rows].float().log_softmax(-1)
        total += (base.exp() * (base - row[rows].float().log_softmax(-1))).sum(dtype=torch.float64)
    return total, counted.sum()


def kl_to_base(logits: Tensor, base_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of :func:`next_token_divergence` over positions, in nats; 0 for equal distributions.

    Example:
        >>> base = torch.tensor([[[0.0, 0.0]]])
        >>> kl_to_base(base, base)
        tensor(0.)
        >>> kl_to_base(torch.tensor([[[1.0, -1.0]]]), base)
        tensor(0.4338)
    """
    total, count = next_token_divergence(logits, base_logits, mask)
    return (total / count).float()


class KLToBase(Metric):
    """:func:`kl_to_base` over all positions of all batches: what a correction changed besides what it was to change.

    Example:
        >>> metric = KLToBase()
        >>> metric.update(torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[0.0, 0.0]]]))
        >>> metric.compute()
        tensor(0.4338)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, base_logits: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch: logits of the model and of the base model ``[batch, tokens, vocabulary]``."""
        total, count = next_token_divergence(logits.detach(), base_logits.detach(), mask)
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """The mean divergence; NaN without any position."""
        return (self.total / self.count).float()
