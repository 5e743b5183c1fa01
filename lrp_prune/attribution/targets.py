"""Targets: the value that is explained, as a scalar computed from a model and a batch."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from lrp_prune.attribution.likelihood import log_likelihood
from lrp_prune.attribution.running import (
    IGNORED,
    attended_labels,
    entry,
    is_causal,
    is_encoder_decoder,
    labels_of,
    logits_of,
    run,
)


@runtime_checkable
class Target(Protocol):
    """Runs the model on a batch and returns the explained value, summed over the batch's samples."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """A scalar tensor."""


class NextToken:
    """Sum of the log-probabilities of the labelled tokens: :math:`\\sum_t \\log p(x_t | x_{<t})`.

    Labels are the batch's ``labels``, else its ``input_ids``. Positions labelled -100 and padded positions are left out. For
    masked language models and encoder-decoders a label belongs to its own position, for causal ones to the one before.
    """

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        logits = logits_of(run(model, batch))
        labels = labels_of(batch)
        if labels is None:
            labels = entry(batch, "input_ids")
        if labels is None or logits.dim() != 3 or labels.dim() != 2:
            raise ValueError(
                "target 'next_token' needs logits [batch, tokens, vocabulary] and labels or input_ids [batch, tokens], got "
                f"logits {tuple(logits.shape)} and {'none' if labels is None else tuple(labels.shape)}"
            )
        attended = attended_labels(model, batch)
        if attended is not None and labels.shape == attended.shape:
            predicted_from = attended if not _is_shifted(model) else torch.cat([attended[:, :1], attended[:, :-1]], 1)
            labels = labels.masked_fill(~(attended & predicted_from), IGNORED)
        if _is_shifted(model):  # the labels move, not the logits: a slice of them is one more copy in backward
            labels = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], 1)
        if not bool((labels != IGNORED).any()):
            raise ValueError("the batch has no labelled, unpadded token: nothing can be explained by 'next_token'")
        return log_likelihood(logits, labels)


class LastToken:
    """The largest logit at each sample's last attended token."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return last_logits(model, batch).amax(-1).sum()


class ClassLogit:
    """The true class's logit, for classifiers with one label per sample."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        logits, labels = logits_of(run(model, batch)), labels_of(batch)
        if labels is None or labels.is_floating_point() or logits.dim() != 2 or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"target 'class' needs logits [batch, classes] and integer labels [batch], got {tuple(logits.shape)} and "
                f"{'none' if labels is None else (tuple(labels.shape), labels.dtype)}"
            )
        return logits.gather(1, labels[:, None]).sum()


class LogitDifference:
    r"""Answer's logit minus the distractors' mean logit, at the last attended token or the logits of a classifier.

    Args:
        answers: one token (or class) id for all samples, or one per sample. A string names an entry of the batch.
        distractors: one id or a list of ids for all samples; a tensor ``[samples, ids]`` or an entry of the batch (one per
            sample, or several) for each sample's own.

    Example:
        >>> LogitDifference(answers=5, distractors=[7, 9])
        LogitDifference(answers=5, distractors=[7, 9])
    """

    def __init__(
        self, answers: int | Sequence[Any] | Tensor | str, distractors: int | Sequence[Any] | Tensor | str
    ) -> None:
        self.answers, self.distractors = answers, distractors

    def __repr__(self) -> str:
        return f"LogitDifference(answers={self.answers!r}, distractors={self.distractors!r})"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        logits = last_logits(model, batch)
        answers = self._ids(self.answers, batch, logits, single=True)
        distractors = self._ids(self.distractors, batch, logits, single=False)
        return (logits.gather(1, answers).mean(1) - logits.gather(1, distractors).mean(1)).sum()

    def _ids(self, given: Any, batch: Any, logits: Tensor, single: bool) -> Tensor:
        value = entry(batch, given) if isinstance(given, str) else given
        if value is None:
            raise ValueError(f"the batch has no entry {given!r} to take token ids from")
        ids = torch.as_tensor(value, device=logits.device)
        if ids.dim() == 0:
            ids = ids.expand(len(logits), 1)
        elif ids.dim() == 1:
            per_sample = single or isinstance(given, str)
            ids = ids[:, None] if per_sample else ids.expand(len(logits), -1)
        if len(ids) != len(logits):
            raise ValueError(f"{len(ids)} token ids for {len(logits)} samples: give one id, or one per sample")
        return ids


def last_logits(model: nn.Module, batch: Any) -> Tensor:
    """Logits ``[batch, classes]`` at the last attended token; those of a classifier as they are."""
    logits = logits_of(run(model, batch))
    if logits.dim() == 2:
        return logits
    attended = attended_labels(model, batch)
    if attended is None or attended.shape != logits.shape[:2]:
        return logits[:, -1]
    positions = torch.arange(attended.shape[1], device=attended.device)
    last = (positions * attended).amax(-1)
    return logits[torch.arange(len(logits), device=logits.device), last.to(logits.device)]


def _is_shifted(model: nn.Module) -> bool:
    """Whether position t predicts token t + 1: not for masked language models and encoder-decoders."""
    return "MaskedLM" not in type(model).__name__ and not is_encoder_decoder(model)


class Inferred:
    """The target that fits the first batch: see :func:`target_of`."""

    def __init__(self) -> None:
        self.chosen: Target | None = None

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if self.chosen is None:
            self.chosen = self._choose(model, batch)
        return self.chosen(model, batch)

    def _choose(self, model: nn.Module, batch: Any) -> Target:
        ids, labels = entry(batch, "input_ids"), labels_of(batch)
        if ids is not None and labels is not None and labels.dim() == 2 and not labels.is_floating_point():
            return NextToken()
        if ids is not None and labels is None and is_causal(model):
            return NextToken()
        if labels is not None and labels.dim() == 1 and not labels.is_floating_point():
            return ClassLogit()
        found = "no labels" if labels is None else f"labels of shape {tuple(labels.shape)} and type {labels.dtype}"
        raise ValueError(
            f"what to explain cannot be inferred for {type(model).__name__} and a batch with {found}: pass target='next_token', "
            "'last_token', 'class', a Target, or a function target(model, batch) -> scalar"
        )


TARGETS: dict[str, Callable[[], Target]] = {"next_token": NextToken, "last_token": LastToken, "class": ClassLogit}
"""The targets that have a name."""


def target_of(target: str | Target | Callable[[nn.Module, Any], Tensor] | None) -> Target:
    """The target by name, or as given; None: inferred from the first batch.

    Inferred is ``next_token`` for token ids with labels for each token, or with a causal language model and no labels;
    ``class`` for one integer label per sample.

    Raises:
        ValueError: for an unknown name.
    """
    if target is None:
        return Inferred()
    if isinstance(target, str):
        if target not in TARGETS:
            raise ValueError(
                f"target must be one of {tuple(TARGETS)}, a Target or a function of model and batch, got {target!r}"
            )
        return TARGETS[target]()
    if not callable(target):
        raise ValueError(f"target must be a name or a function target(model, batch) -> scalar tensor, got {target!r}")
    return cast(Target, target)


def describe(target: Target) -> str:
    """The target in words, by which relevance of the same target is recognised."""
    if isinstance(target, Inferred):
        return describe(target.chosen) if target.chosen is not None else "inferred"
    named = next((name for name, kind in TARGETS.items() if type(target) is kind), None)
    return named or getattr(target, "__qualname__", None) or repr(target)
