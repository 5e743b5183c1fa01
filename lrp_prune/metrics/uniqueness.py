"""How much a generated text repeats itself."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def response_uniqueness_ratio(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Distinct tokens over generated tokens: :math:`r = |U| / |T|`, 0 for an empty response.

    Source: SparC3 (arXiv 2506.13727), eq. 11.

    Args:
        tokens: generated token ids ``[responses, tokens]``, without the prompt.
        mask: what counts, ``[responses, tokens]``, True or 1 (padding after the end of a response is 0); None for all.

    Returns:
        Float32 ``[responses]``, in [0, 1].

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> response_uniqueness_ratio(torch.tensor([[5, 5, 5, 5], [1, 2, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
        tensor([0.2500, 1.0000])
    """
    if tokens.dim() != 2 or tokens.is_floating_point():
        raise ValueError(f"tokens must be ids [responses, tokens], got {tokens.dtype} {tuple(tokens.shape)}")
    if mask is None:
        mask = torch.ones_like(tokens, dtype=torch.bool)
    if mask.shape != tokens.shape:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}, the tokens {tuple(tokens.shape)}")
    mask = mask.bool()
    if tokens.shape[1] == 0:
        return torch.zeros(len(tokens), device=tokens.device)
    # What does not count sorts behind everything else.
    ranked, order = tokens.masked_fill(~mask, torch.iinfo(tokens.dtype).max).sort(dim=1)
    counted = mask.gather(1, order)
    new = torch.ones_like(counted)
    new[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    # Of equal tokens one counts, whichever of them is masked.
    distinct = (new & counted).sum(1)
    return distinct / mask.sum(1).clamp(min=1)


class ResponseUniquenessRatio(Metric):
    """Mean of :func:`response_uniqueness_ratio` over responses; low where a model repeats itself.

    Args:
        threshold: count the share of responses whose ratio is at most this, instead of the mean: 0.5 is what SparC3
            calls repetitive.
        **kwargs: of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = ResponseUniquenessRatio()
        >>> metric.update(torch.tensor([[5, 5, 5, 5], [1, 2, 3, 4]]))
        >>> metric.compute()
        tensor(0.6250)
    """

    is_differentiable = False
    higher_is_better = None  # with a threshold the lower is the better
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, threshold: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, tokens: Tensor, mask: Tensor | None = None) -> None:
        """Add responses: token ids ``[responses, tokens]`` and what counts of them."""
        ratios = response_uniqueness_ratio(tokens, mask)
        values = ratios if self.threshold is None else ratios <= self.threshold
        self.total += values.double().sum()
        self.count += len(ratios)

    def compute(self) -> Tensor:
        """The mean ratio, or the share of repetitive responses; NaN without any response."""
        return (self.total / self.count).float()
