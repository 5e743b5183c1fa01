"""How well a language model predicts text."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

IGNORED = -100


def next_token_loss(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Summed negative log-likelihood of tokens after the first, and how many there are.

    :math:`-\sum_t \log p(x_t | x_{<t})`, with the logits of position :math:`t - 1`.

    Args:
        logits: ``[batch, tokens, vocabulary]``, of any floating-point type; computed in float32.
        tokens: ids ``[batch, tokens]``; -100 is left out.
        mask: 1 for real tokens, ``[batch, tokens]``; a token that is padding, or predicted from padding, is left out.

    Returns:
        A float64 scalar and an int64 one.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.dim() != 3 or logits.shape[:2] != tokens.shape or (mask is not None and mask.shape != tokens.shape):
        raise ValueError(
            f"logits [batch, tokens, vocabulary], tokens and mask [batch, tokens] must fit, got {tuple(logits.shape)}, "
            f"{tuple(tokens.shape)} and {None if mask is None else tuple(mask.shape)}"
        )
    labels = tokens[:, 1:]
    if mask is not None:
        labels = labels.masked_fill((mask[:, 1:] == 0) | (mask[:, :-1] == 0), IGNORED)
    counted = labels != IGNORED
    # Sample by sample: the float32 copy of a whole batch's logits may be larger than the model.
    losses = [
        F.cross_entropy(row[:-1].float(), label, ignore_index=IGNORED, reduction="sum").double()
        for row, label in zip(logits, labels, strict=True)
    ]
    total = torch.stack(losses).sum() if losses else logits.new_zeros((), dtype=torch.float64)
    return total, counted.sum()


def perplexity(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Perplexity of tokens under a causal language model: :math:`\exp(-\frac{1}{n} \sum_t \log p(x_t | x_{<t}))`.

    Args:
        logits: ``[batch, tokens, vocabulary]``.
        tokens: ids ``[batch, tokens]``.
        mask: see :func:`next_token_loss`.

    Example:
        >>> perplexity(torch.zeros(1, 3, 10), torch.tensor([[4, 5, 6]]))
        tensor(10.)
    """
    total, count = next_token_loss(logits, tokens, mask)
    return (total / count).exp().float()


class Perplexity(Metric):
    """:func:`perplexity` over all tokens of all batches; the metric that guards general text.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(torch.zeros(1, 3, 10), torch.tensor([[4, 5, 6]]))
        >>> metric.update(torch.zeros(2, 5, 10), torch.ones(2, 5, dtype=torch.long))
        >>> metric.compute()
        tensor(10.)
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

    def update(self, logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch: logits ``[batch, tokens, vocabulary]``, tokens and mask ``[batch, tokens]``."""
        total, count = next_token_loss(logits.detach(), tokens, mask)
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """The perplexity; NaN without any token."""
        return (self.total / self.count).exp().float()
