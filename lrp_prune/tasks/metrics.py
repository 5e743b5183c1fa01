r"""Metrics of a task, from the logits ``[samples, vocabulary]`` at the answer's position; one value for each sample.

==========================  =============================================================================================
``logit_difference``        mean logit of the answers minus that of the distractors
``probability_difference``  probability of all answers minus that of all distractors (greater-than: arXiv 2305.00586)
``accuracy``                1 where the best answer's logit is above that of every distractor, else 0
``kl``                      :math:`\mathrm{KL}(p_\mathrm{full} \,\|\, p)`, from the logits of the full model; lower is better
==========================  =============================================================================================
"""

from collections.abc import Mapping

import torch
from torch import Tensor

METRICS: tuple[str, ...] = ("logit_difference", "probability_difference", "accuracy", "kl")
IGNORED = -1
"""The id that fills up rows of answers and distractors to equal length."""


def metric_values(
    metric: str, logits: Tensor, answers: Tensor, distractors: Tensor, full_logits: Tensor | None = None
) -> Tensor:
    """One metric for each sample.

    Args:
        metric: one of :data:`METRICS`.
        logits: ``[samples, vocabulary]``.
        answers: token ids ``[samples, any]``, filled up by -1.
        distractors: token ids ``[samples, any]``, filled up by -1.
        full_logits: of the full model, for ``kl``.

    Returns:
        ``[samples]``, in float32 or wider.

    Raises:
        ValueError: for an unknown metric, or ``kl`` without ``full_logits``.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0, 0.0]])
        >>> metric_values("logit_difference", logits, torch.tensor([[0]]), torch.tensor([[1, 2]]))
        tensor([2.5000])
        >>> metric_values("accuracy", logits, torch.tensor([[1]]), torch.tensor([[0, -1]]))
        tensor([0.])
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if metric == "kl":
        if full_logits is None:
            raise ValueError("metric 'kl' compares with the full model: give full_logits")
        return kl_divergence(full_logits, logits)
    right, wrong = answers != IGNORED, distractors != IGNORED
    if metric == "probability_difference":
        logits = logits.softmax(-1)
    answered = logits.gather(1, answers.clamp(min=0))
    distracted = logits.gather(1, distractors.clamp(min=0))
    if metric == "accuracy":
        best, rival = answered.masked_fill(~right, -torch.inf), distracted.masked_fill(~wrong, -torch.inf)
        return (best.amax(1) > rival.amax(1)).to(logits.dtype)
    totals = (answered * right).sum(1), (distracted * wrong).sum(1)
    if metric == "probability_difference":
        return totals[0] - totals[1]
    return totals[0] / right.sum(1) - totals[1] / wrong.sum(1)


def kl_divergence(full_logits: Tensor, logits: Tensor) -> Tensor:
    r""":math:`\sum_v p_\mathrm{full}(v) (\log p_\mathrm{full}(v) - \log p(v))` of logits ``[samples, vocabulary]``."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    full, log_p = full_logits.to(wide).log_softmax(-1), logits.to(wide).log_softmax(-1)
    return torch.where(full > -torch.inf, full.exp() * (full - log_p), 0.0).sum(
        -1
    )  # what has no probability adds nothing


def batch_metric(metric: str, logits: Tensor, batch: Mapping[str, Tensor], full_logits: Tensor | None = None) -> Tensor:
    """:func:`metric_values` for a task's batch."""
    answers, distractors = batch["answers"].to(logits.device), batch["distractors"].to(logits.device)
    return metric_values(metric, logits, answers, distractors, full_logits)
