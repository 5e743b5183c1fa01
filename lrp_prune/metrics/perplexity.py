"""How well a language model predicts text."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lrp_prune.metrics.mean import Mean

IGNORED = -100


def next_token_loss(preds: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Summed negative log-likelihood of tokens after the first, and how many there are.

    :math:`-\sum_t \log p(x_t | x_{<t})`, with the logits of position :math:`t - 1`.

    Args:
        preds: logits ``[batch, tokens, vocabulary]``, of any floating-point type; computed in float32.
        target: token ids ``[batch, tokens]``; -100 is left out.
        mask: 1 for real tokens, ``[batch, tokens]``; a token that is padding, or predicted from padding, is left out.

    Returns:
        A float64 scalar and an int64 one.

    Raises:
        ValueError: the shapes do not fit.
    """
    if preds.dim() != 3 or preds.shape[:2] != target.shape or (mask is not None and mask.shape != target.shape):
        raise ValueError(
            f"preds [batch, tokens, vocabulary], target and mask [batch, tokens] must fit, got {tuple(preds.shape)}, "
            f"{tuple(target.shape)} and {None if mask is None else tuple(mask.shape)}"
        )
    labels = target[:, 1:]
    if mask is not None:
        labels = labels.masked_fill((mask[:, 1:] == 0) | (mask[:, :-1] == 0), IGNORED)
    counted = labels != IGNORED
    # Sample by sample: the float32 copy of a whole batch's logits may be larger than the model.
    losses = [
        F.cross_entropy(row[:-1].float(), label, ignore_index=IGNORED, reduction="sum").double()
        for row, label in zip(preds, labels, strict=True)
    ]
    total = torch.stack(losses).sum() if losses else preds.new_zeros((), dtype=torch.float64)
    return total, counted.sum()


def perplexity(preds: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Perplexity of tokens under a causal language model: :math:`\exp(-\frac{1}{n} \sum_t \log p(x_t | x_{<t}))`.

    Args:
        preds: logits ``[batch, tokens, vocabulary]``.
        target: token ids ``[batch, tokens]``.
        mask: see :func:`next_token_loss`.

    Example:
        >>> perplexity(torch.zeros(1, 3, 10), torch.tensor([[4, 5, 6]]))
        tensor(10.)
    """
    total, count = next_token_loss(preds, target, mask)
    return (total / count).exp().float()


class Perplexity(Mean):
    """:func:`perplexity` over all tokens of all batches; the metric that guards general text.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(torch.zeros(1, 3, 10), torch.tensor([[4, 5, 6]]))
        >>> metric.update(torch.zeros(2, 5, 10), torch.ones(2, 5, dtype=torch.long))
        >>> metric.compute()
        tensor(10.)
    """

    higher_is_better = False

    def update(self, preds: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch: logits ``[batch, tokens, vocabulary]``, token ids and mask ``[batch, tokens]``."""
        total, count = next_token_loss(preds.detach(), target, mask)
        self.add(total, count)

    def compute(self) -> Tensor:
        """The perplexity; NaN without any token."""
        return (self.total / self.count).exp().float()
