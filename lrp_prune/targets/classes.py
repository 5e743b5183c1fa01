"""Targets with one label for each sample, or one for each output."""

from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.models.batches import IGNORED
from lrp_prune.models.outputs import answer_of
from lrp_prune.models.profile import profile_of
from lrp_prune.targets.alignment import aligned, check_range, padded, shape_of, without_ignored
from lrp_prune.targets.likelihood import checked_odds, likelihood, soft_likelihood

_ROUNDING = 1e-3


class ClassLabel:
    r"""The true class's logit :math:`\sum z_y`, or with a probability for each class their mean :math:`\sum_c y_c z_c`.

    Labels are ``[samples]`` (-100 leaves a sample out), or ``[samples, classes]`` in rows that sum to one, as mixed samples or a
    teacher have them; logits ``[samples, classes]``.

    Args:
        odds: None for the logit, as in most works on relevance: all samples count alike, and the other classes are not looked
            at; else how likely the class is, with this share of log-odds (1: the logit beyond those of the other classes, 0:
            log-probabilities; :mod:`~lrp_prune.targets.likelihood`).

    Raises:
        ValueError: for a share that is not between 0 and 1; on a call, for other logits or labels, or labels that are no classes.

    Example:
        >>> ClassLabel()(nn.Identity(), (torch.tensor([[1.0, 3.0], [2.0, 0.0]]), torch.tensor([1, 0])))
        tensor(5.)
    """

    def __init__(self, odds: float | None = None) -> None:
        self.odds = None if odds is None else checked_odds(odds)

    def __repr__(self) -> str:
        return f"ClassLabel({'' if self.odds is None else f'odds={self.odds:g}'})"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        logits, labels = answer_of(model, batch)
        if labels is not None and logits.dim() == 2 and logits.shape[1] > 1:
            if labels.shape == logits.shape and are_shares(labels):
                if self.odds is None:
                    return (labels.to(logits.dtype) * logits).sum()
                return soft_likelihood(logits, labels, self.odds)
            if not labels.is_floating_point() and labels.shape in (logits.shape[:1], (len(logits), 1)):
                labels = labels.view(-1, 1).long()
                check_range(labels, logits.shape[1], "class")
                if self.odds is not None:
                    return likelihood(logits, labels, self.odds)
                chosen = logits.gather(1, labels.clamp(min=0))
                return torch.where(labels == IGNORED, 0.0, chosen).sum()
        raise ValueError(
            "target 'class' needs logits [samples, classes] and integer labels [samples], or labels [samples, classes] whose "
            f"rows sum to one, got logits {shape_of(logits)} and labels {shape_of(labels)}"
        )


def are_shares(labels: Tensor) -> bool:
    """Whether each row of labels is a distribution over classes, one-hot ones included.

    Example:
        >>> are_shares(torch.tensor([[0.0, 1.0], [0.3, 0.7]])), are_shares(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
        (True, False)
    """
    return bool((labels >= 0).all()) and bool(((labels.double().sum(1) - 1).abs() < _ROUNDING).all())


class MultiLabel:
    r"""The logits of labels that are set minus those of labels that are not: :math:`\sum (2 y - 1) z`.

    Each output is a question with the answers yes and no, whose log-odds are :math:`z` and :math:`-z`. Labels are between 0 and
    1 and of the logits' shape, or ``[samples]`` for logits ``[samples, 1]``; labels of -100 and, where there is a label for each
    token, padded ones are left out.

    Raises:
        ValueError: on a call, for other labels.

    Example:
        >>> MultiLabel()(nn.Identity(), (torch.tensor([[1.0, 3.0, 5.0]]), torch.tensor([[0.0, 1.0, 1.0]])))
        tensor(7.)
    """

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        logits, labels = answer_of(model, batch)
        profile = profile_of(model)
        values = None if labels is None else aligned(logits, labels, profile)
        if labels is None or values is None:
            raise ValueError(
                f"target 'multi_label' needs labels of the logits' shape, got logits {shape_of(logits)} and labels "
                f"{shape_of(labels)}"
            )
        labels = without_ignored(labels, profile)
        left_out = labels == IGNORED
        padding = padded(model, batch, profile, values)
        if padding is not None:
            left_out = left_out | padding
        if not bool(((labels >= 0) & (labels <= 1) | left_out).all()):
            raise ValueError("target 'multi_label' needs labels between 0 and 1 (-100 for what is left out)")
        return ((2 * labels.to(values.dtype) - 1) * values).masked_fill(left_out, 0.0).sum()
