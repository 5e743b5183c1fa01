"""Targets with one label for each token or pixel, or for the one that follows."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.models.batches import IGNORED, entry
from lrp_prune.models.calling import labels_of
from lrp_prune.models.outputs import answer_of, logits_for
from lrp_prune.models.padding import attended_labels
from lrp_prune.models.profile import Profile, profile_of
from lrp_prune.targets.alignment import check_range, classes_last, positions_first, shape_of, without_ignored
from lrp_prune.targets.likelihood import ODDS, checked_odds, likelihood

_ONE_BATCH = ContextVar("_ONE_BATCH", default=False)
"""Whether what is explained is one batch, and nothing where that has no labels."""


@contextmanager
def labelled() -> Iterator[None]:
    """For what is about one batch: one in which nothing is labelled is refused.

    Raises:
        ValueError: likewise.
    """
    token = _ONE_BATCH.set(True)
    try:
        yield
    finally:
        _ONE_BATCH.reset(token)


class NextToken:
    r"""How likely the labelled tokens are, each given those before it: :math:`\sum_t \log p_t - \lambda \log (1 - p_t)`.

    With :math:`p_t = p(x_t | x_{<t})`, between log-probabilities, in which what a model is sure of counts for nothing, and
    log-odds, in which all positions count alike (:mod:`~lrp_prune.targets.likelihood`).

    Labels are the batch's ``labels``, else its ``input_ids``. Positions labelled -100 and padded positions are left out. Labels
    are shifted by one, since the logits at a token are about the next one; of an encoder-decoder they are those of its decoder,
    which are not shifted.

    Args:
        odds: :math:`\lambda`, the share of log-odds, between 0 (log-probabilities) and 1.

    Raises:
        ValueError: for another share; on a call, for logits that are not ``[samples, tokens, vocabulary]`` (or ``[samples,
            vocabulary, tokens]``), or labels that are not ``[samples, tokens]``.

    Example:
        >>> ids = torch.tensor([[0, 2, 1]])
        >>> NextToken(odds=0)(nn.Embedding.from_pretrained(torch.zeros(3, 4)), {"input": ids, "labels": ids})  # 2 log(1/4)
        tensor(-2.7726)
    """

    def __init__(self, odds: float = ODDS) -> None:
        self.odds = checked_odds(odds)

    def __repr__(self) -> str:
        return f"NextToken({'' if self.odds == ODDS else f'odds={self.odds:g}'})"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        logits, labels = answer_of(model, batch)
        labels, profile = entry(batch, "input_ids") if labels is None else labels, profile_of(model)
        fitting = None
        if labels is not None and labels.dim() == 2 and not labels.is_floating_point():
            fitting = classes_last(logits, labels, profile, -1)
            fitting = classes_last(logits, labels, profile, 1) if fitting is None else fitting
        if labels is None or fitting is None:
            raise ValueError(
                "target 'next_token' needs logits [samples, tokens, vocabulary] and labels or input_ids [samples, tokens], got "
                f"logits {shape_of(logits)} and labels {shape_of(labels)}"
            )
        labels = labels.long().to(logits.device)
        attended, shifted = attended_labels(model, batch), not profile.encoder_decoder
        if attended is not None and labels.shape == attended.shape:
            attended = attended.to(labels.device)
            before = torch.cat([attended[:, :1], attended[:, :-1]], 1) if shifted else attended
            labels = labels.masked_fill(~(attended & before), IGNORED)
        if shifted:  # the labels move, not the logits: a slice of them is one more copy in backward
            labels = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], 1)
        _check_labels(labels, fitting.shape[-1], "next_token")
        return likelihood(fitting, labels, self.odds)


class TokenLabel:
    r"""How likely labels are at their own position: :math:`\sum_t \log p_t - \lambda \log (1 - p_t)`, as for :class:`NextToken`.

    For masked language models, token classification, and segmentation, with a label for each pixel. Positions labelled -100
    and padded ones are left out. Where the classes are the last dimension, no copy of the logits is made.

    Args:
        class_dim: where the classes are, -1 for ``[samples, *positions, classes]`` or 1 for ``[samples, classes,
            *positions]``; None for what fits the labels ``[samples, *positions]``.
        ignored: a further label that is left out; by default that of the model's own loss (255 for most segmentations).
        odds: :math:`\lambda`, the share of log-odds (:mod:`~lrp_prune.targets.likelihood`), between 0 (log-probabilities) and 1.

    Raises:
        ValueError: for another share; on a call, if labels and logits do not fit, or fit in both ways, or labels are no classes.

    Example:
        >>> images, labels = torch.zeros(1, 4, 2, 2), torch.tensor([[[0, 3], [255, 1]]])
        >>> TokenLabel(ignored=255, odds=0)(nn.Identity(), (images, labels))  # 3 log(1/4)
        tensor(-4.1589)
    """

    def __init__(self, class_dim: int | None = None, ignored: int | None = None, odds: float = ODDS) -> None:
        if class_dim not in (None, 1, -1):
            raise ValueError(f"class_dim must be 1, -1 or None, got {class_dim!r}")
        self.class_dim, self.ignored, self.odds = class_dim, ignored, checked_odds(odds)

    def __repr__(self) -> str:
        odds = None if self.odds == ODDS else self.odds
        given = {"class_dim": self.class_dim, "ignored": self.ignored, "odds": odds}
        return f"TokenLabel({', '.join(f'{name}={value:g}' for name, value in given.items() if value is not None)})"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        logits, labels = answer_of(model, batch)
        profile = profile_of(model)
        fitting = None
        if labels is not None and not labels.is_floating_point():
            fitting = classes_last(logits, labels, profile, self.class_dim)
        if labels is None or fitting is None:
            raise ValueError(
                "target 'token' needs integer labels [samples, *positions] and logits [samples, *positions, classes] or "
                f"[samples, classes, *positions], got labels {shape_of(labels)} and logits {shape_of(logits)}"
            )
        if fitting.shape[-1] == 1:
            raise ValueError(
                "target 'token' compares classes, and the model has one output for each label: use target='multi_label'"
            )
        labels, attended = without_ignored(labels.long(), profile, self.ignored), attended_labels(model, batch)
        if attended is not None and labels.shape == attended.shape:
            labels = labels.masked_fill(~attended.to(labels.device), IGNORED)
        _check_labels(labels, fitting.shape[-1], "token")
        return likelihood(fitting, labels, self.odds)


class LastToken:
    r"""The largest logit at each sample's last attended token :math:`T`, summed: :math:`\sum \max_v z_T(v)`.

    Of a masked language model or token classifier at the last one that is labelled, or masked, where the batch says it.

    Of a classifier, whose logits are ``[samples, classes]``, the largest of each sample.

    Example:
        >>> LastToken()(nn.Identity(), torch.tensor([[1.0, 3.0], [2.0, 0.0]]))
        tensor(5.)
    """

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return last_logits(model, batch).amax(-1).sum()


def last_logits(model: nn.Module, batch: Any) -> Tensor:
    """Logits ``[samples, classes]`` at the last attended token; those of a classifier as they are, of pixels their mean.

    Of a masked language model or token classifier they are at :func:`places_answered`, where the batch says them.

    Which dimension has the positions of a model that is not of transformers, its batch tells (:func:`positions_first`).

    A model with a single output, ``[samples]``, has one class.
    """
    logits = logits_for(model, batch)
    if logits.dim() < 2:
        return logits.reshape(-1, 1)
    if logits.dim() == 2:
        return logits
    if logits.dim() > 3:  # a class for each pixel
        return logits.flatten(2).mean(-1)
    if profile_of(model).kind is None:
        logits = positions_first(logits, batch)
    answered = places_answered(model, batch)
    if answered is not None and len(answered) == len(logits):
        return logits[torch.arange(len(logits), device=logits.device), answered.to(logits.device)]
    attended = attended_labels(model, batch)
    if attended is None or attended.shape != logits.shape[:2]:
        return logits[:, -1]
    positions = torch.arange(attended.shape[1], device=attended.device)
    last = (positions * attended).amax(-1)
    return logits[torch.arange(len(logits), device=logits.device), last.to(logits.device)]


def answers_by_token(profile: Profile) -> bool:
    """Whether a model answers at some of its tokens, which are not always the last."""
    return profile.kind is not None and profile.kind.targets[:1] == ("token",) and "last_token" in profile.kind.targets


def places_answered(model: nn.Module, batch: Any) -> Tensor | None:
    """Each sample's last token that is labelled, or masked, ``[samples]``; None where a sample has none, or nothing tells.

    Args:
        model: a masked language model or token classifier; None for any other.
        batch: its labels are ``[samples, tokens]``.
    """
    profile, ids = profile_of(model), entry(batch, "input_ids")
    if not answers_by_token(profile):
        return None
    labels, masked = labels_of(model, batch), getattr(profile.config, "mask_token_id", None)
    if labels is not None and labels.dim() == 2 and not labels.is_floating_point():
        asked = labels != IGNORED
    elif masked is not None and isinstance(ids, Tensor) and ids.dim() == 2:
        asked = ids == masked
    else:
        return None
    return (torch.arange(asked.shape[1], device=asked.device) * asked).amax(-1) if bool(asked.any(-1).all()) else None


def _check_labels(labels: Tensor, classes: int, target: str) -> None:
    check_range(labels, classes, target)
    if not bool((labels != IGNORED).any()):
        told = f"a batch has no labelled, unpadded token: target {target!r} explains nothing of it"
        if _ONE_BATCH.get():
            raise ValueError(told)
        warnings.warn(f"{told}, and it adds no relevance", stacklevel=2)
