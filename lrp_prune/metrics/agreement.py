"""Whether two models say the same."""

from typing import Any

import torch
from torch import Tensor

from lrp_prune.metrics.mean import Mean

COUNTS: tuple[str, ...] = ("prefix", "position", "exact")


def greedy_agreement(
    preds: Tensor,
    target: Tensor,
    preds_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    count: str = "prefix",
) -> Tensor:
    r"""How much of a base model's greedy generation another model repeats.

    With generations :math:`x` and :math:`y` (base) of length :math:`n = \max(|x|, |y|)`: ``"prefix"``, the length of
    their common beginning over :math:`n` (after the first difference the models read different texts);
    ``"position"``, the number of equal tokens at equal positions over :math:`n`; ``"exact"``, 1 if all are equal. Two
    empty generations agree.

    Args:
        preds: ids that the model generated ``[responses, tokens]``, without the prompt, from the left.
        target: of the base model ``[responses, base tokens]``.
        preds_mask: 1 for the model's real tokens; padding comes after them.
        target_mask: likewise.
        count: see above.

    Returns:
        Float32 ``[responses]``, in [0, 1].

    Raises:
        ValueError: the shapes do not fit, or ``count`` is unknown.

    Example:
        >>> greedy_agreement(torch.tensor([[1, 2, 9, 4]]), torch.tensor([[1, 2, 3, 4]]))
        tensor([0.5000])
        >>> greedy_agreement(torch.tensor([[1, 2, 9, 4]]), torch.tensor([[1, 2, 3, 4]]), count="position")
        tensor([0.7500])
    """
    if count not in COUNTS:
        raise ValueError(f"count must be one of {COUNTS}, got {count!r}")
    if preds.dim() != 2 or target.dim() != 2 or len(preds) != len(target):
        raise ValueError(
            f"preds and target must be [responses, tokens] of equally many responses, got {tuple(preds.shape)} and "
            f"{tuple(target.shape)}"
        )
    lengths = _lengths(preds, preds_mask)
    longest = torch.maximum(lengths, _lengths(target, target_mask))
    common = min(preds.shape[1], target.shape[1])
    shorter = torch.minimum(lengths, _lengths(target, target_mask))
    inside = torch.arange(common, device=preds.device) < shorter[:, None]
    equal = (preds[:, :common] == target[:, :common]) & inside
    matches = equal.long().cumprod(1).sum(1) if count == "prefix" else equal.sum(1)
    if count == "exact":
        return (matches == longest).float()
    return torch.where(longest == 0, 1.0, matches / longest.clamp(min=1))


def _lengths(tokens: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
    if mask.shape != tokens.shape:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}, the tokens {tuple(tokens.shape)}")
    if bool((mask.long().diff(dim=1) > 0).any()):
        raise ValueError("padding must come after the generated tokens: cut the prompt off and pad on the right")
    return mask.long().sum(1)


class GreedyAgreement(Mean):
    """Mean of :func:`greedy_agreement` over responses.

    Args:
        count: ``"prefix"``, ``"position"`` or ``"exact"``.
        **kwargs: of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = GreedyAgreement()
        >>> metric.update(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 5]]))
        >>> metric.compute()
        tensor(0.7500)
    """

    higher_is_better = True

    def __init__(self, count: str = "prefix", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if count not in COUNTS:
            raise ValueError(f"count must be one of {COUNTS}, got {count!r}")
        self.counting = count

    def update(
        self, preds: Tensor, target: Tensor, preds_mask: Tensor | None = None, target_mask: Tensor | None = None
    ) -> None:
        """Add generations of the model and of the base model for the same prompts."""
        shares = greedy_agreement(preds, target, preds_mask, target_mask, self.counting)
        self.add(shares.double().sum(), len(shares))
