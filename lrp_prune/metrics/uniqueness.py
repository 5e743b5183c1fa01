"""How much a generated text repeats itself."""

from typing import Any

import torch
from torch import Tensor

from lrp_prune.metrics.mean import Mean


def response_uniqueness_ratio(preds: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Distinct tokens over generated tokens: :math:`r = |U| / |T|`, 0 for an empty response.

    Source: SparC3 (arXiv 2506.13727), eq. 11.

    Args:
        preds: generated token ids ``[responses, tokens]``, without the prompt.
        mask: what counts, ``[responses, tokens]``, True or 1 (padding after the end of a response is 0); None for all.

    Returns:
        Float32 ``[responses]``, in [0, 1].

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> response_uniqueness_ratio(torch.tensor([[5, 5, 5, 5], [1, 2, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
        tensor([0.2500, 1.0000])
    """
    if preds.dim() != 2 or preds.is_floating_point():
        raise ValueError(f"preds must be ids [responses, tokens], got {preds.dtype} {tuple(preds.shape)}")
    if mask is None:
        mask = torch.ones_like(preds, dtype=torch.bool)
    if mask.shape != preds.shape:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}, preds {tuple(preds.shape)}")
    mask = mask.bool()
    if preds.shape[1] == 0:
        return torch.zeros(len(preds), device=preds.device)
    # What does not count sorts behind everything else.
    ranked, order = preds.masked_fill(~mask, torch.iinfo(preds.dtype).max).sort(dim=1)
    counted = mask.gather(1, order)
    new = torch.ones_like(counted)
    new[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    # Of equal preds one counts, whichever of them is masked.
    distinct = (new & counted).sum(1)
    return distinct / mask.sum(1).clamp(min=1)


class ResponseUniquenessRatio(Mean):
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

    higher_is_better = None  # with a threshold the lower is the better

    def __init__(self, threshold: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold

    def update(self, preds: Tensor, mask: Tensor | None = None) -> None:
        """Add responses: token ids ``[responses, tokens]`` and what counts of them."""
        ratios = response_uniqueness_ratio(preds, mask)
        values = ratios if self.threshold is None else ratios <= self.threshold
        self.add(values.double().sum(), len(ratios))
