"""How far a model's next-token distributions are from those of the model it was made from."""

import torch
from torch import Tensor

from lrp_prune.metrics.mean import Mean
from lrp_prune.tasks.metrics import kl_divergence


def next_token_divergence(preds: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Summed divergence of next-token distributions, and how many positions there are.

    :math:`\sum_t \mathrm{KL}(p_t^{\mathrm{base}} \,\|\, p_t) = \sum_t \sum_v p_t^{\mathrm{base}}(v)
    (\log p_t^{\mathrm{base}}(v) - \log p_t(v))`, in nats.

    Args:
        preds: logits of the model, ``[batch, tokens, vocabulary]``, of any floating-point type; computed in float32.
        target: of the base model, of the same shape.
        mask: 1 for positions that count, ``[batch, tokens]``; None for all.

    Returns:
        A float64 scalar and an int64 one.

    Raises:
        ValueError: the shapes do not fit.
    """
    if preds.dim() != 3 or preds.shape != target.shape or (mask is not None and mask.shape != preds.shape[:2]):
        raise ValueError(
            f"preds and target must be [batch, tokens, vocabulary] and the mask [batch, tokens], got {tuple(preds.shape)}, "
            f"{tuple(target.shape)} and {None if mask is None else tuple(mask.shape)}"
        )
    counted = torch.ones(preds.shape[:2], dtype=torch.bool, device=preds.device) if mask is None else mask.bool()
    total = preds.new_zeros((), dtype=torch.float64)
    for row, target_row, rows in zip(preds, target, counted, strict=True):
        total += kl_divergence(target_row[rows].float(), row[rows].float()).sum(dtype=torch.float64)
    return total, counted.sum()


def kl_to_base(preds: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of :func:`next_token_divergence` over positions, in nats; 0 for equal distributions.

    Example:
        >>> base = torch.tensor([[[0.0, 0.0]]])
        >>> kl_to_base(base, base)
        tensor(0.)
        >>> kl_to_base(torch.tensor([[[1.0, -1.0]]]), base)
        tensor(0.4338)

    Tokens that both exclude (logits of minus infinity) add nothing; one that only the model excludes makes it infinite.
    """
    total, count = next_token_divergence(preds, target, mask)
    return (total / count).float()


class KLToBase(Mean):
    """:func:`kl_to_base` over all positions of all batches: what a correction changed besides what it was to change.

    Example:
        >>> metric = KLToBase()
        >>> metric.update(torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[0.0, 0.0]]]))
        >>> metric.compute()
        tensor(0.4338)
    """

    higher_is_better = False

    def update(self, preds: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch: logits of the model and of the base model ``[batch, tokens, vocabulary]``."""
        total, count = next_token_divergence(preds.detach(), target.detach(), mask)
        self.add(total, count)
