"""A model's own loss says what its labels are about: it equals the loss of one reading of them, and not that of another."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_prune.models.batches import IGNORED
from lrp_prune.models.padding import attended_labels
from lrp_prune.models.profile import Profile, profile_of
from lrp_prune.targets.alignment import aligned, classes_last, padded, without_ignored
from lrp_prune.targets.classes import ClassLabel, MultiLabel, are_shares
from lrp_prune.targets.naming import Target
from lrp_prune.targets.tokens import NextToken, TokenLabel
from lrp_prune.targets.values import PredictedValues


def readings_by_loss(model: nn.Module, batch: Any, logits: Tensor, labels: Tensor, loss: Tensor) -> list[Target]:
    """The readings of the labels whose loss is this one, up to rounding.

    None for a loss with label smoothing, class weights or further terms; several where readings agree by chance.

    Args:
        model: what was run.
        batch: on what.
        logits: what came out.
        labels: what should.
        loss: the model's own.
    """
    if loss.numel() != 1 or not bool(torch.isfinite(loss)):
        return []
    found: dict[str, Target] = {}
    for target, value in _losses(model, batch, logits, labels):
        # What is summed in float32 differs in its last bits; half precision is rounded once.
        tolerance = (2 if loss.dtype.itemsize < 4 else 64) * torch.finfo(loss.dtype).eps
        if abs(float(value) - float(loss)) <= tolerance * max(abs(float(loss)), 1e-3):
            found.setdefault(repr(target) if isinstance(target, TokenLabel) else type(target).__name__, target)
    return list(found.values())


def _losses(model: nn.Module, batch: Any, logits: Tensor, labels: Tensor) -> Iterator[tuple[Target, Tensor]]:
    profile, logits = profile_of(model), logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not labels.is_floating_point():
        yield from _of_tokens(profile, attended_labels(model, batch), logits, labels.long())
        if logits.dim() == 2 and labels.numel() == len(logits):
            yield from _if_classes(logits, labels.view(-1).long(), ClassLabel)
    elif labels.shape == logits.shape and labels.dim() == 2 and logits.shape[1] > 1 and are_shares(labels):
        yield ClassLabel(), F.cross_entropy(logits, labels.to(logits.dtype))
    values = aligned(logits, labels, profile)
    if values is None:
        return
    given = without_ignored(labels, profile)
    counted, expected = given != IGNORED, given.to(values.dtype)
    yield PredictedValues(), F.mse_loss(values, expected)
    yield PredictedValues(), F.l1_loss(values, expected)
    if bool(((given >= 0) & (given <= 1) | ~counted).all()):
        each = F.binary_cross_entropy_with_logits(values, expected.clamp(0, 1), reduction="none") * counted
        yield MultiLabel(), each.mean()
        padding = padded(model, batch, profile, values)
        if padding is not None:
            yield MultiLabel(), each.masked_select(~padding).mean()


def _of_tokens(
    profile: Profile, attended: Tensor | None, logits: Tensor, labels: Tensor
) -> Iterator[tuple[Target, Tensor]]:
    labels = without_ignored(labels, profile)
    versions = [labels]
    if attended is not None and attended.shape == labels.shape:
        versions.append(labels.masked_fill(~attended.to(labels.device), IGNORED))
    try:
        layouts = [(TokenLabel(), classes_last(logits, labels, profile))]
    except ValueError:  # both fit
        layouts = [(TokenLabel(dim), classes_last(logits, labels, profile, dim)) for dim in (-1, 1)]
    for target, fitting in layouts:
        for each in versions if fitting is not None else ():
            assert fitting is not None
            if profile.encoder_decoder and fitting.dim() == 3:
                yield from _if_classes(fitting, each, NextToken)
                continue
            yield from ((target, value) for _, value in _if_classes(fitting, each, TokenLabel))
            if fitting.dim() == 3:
                yield from _if_classes(fitting[:, :-1], each[:, 1:], NextToken)


def _if_classes(logits: Tensor, labels: Tensor, target: Callable[[], Target]) -> Iterator[tuple[Target, Tensor]]:
    """The cross-entropy, if the labels are classes at all: others would end a process on a GPU."""
    counted = labels != IGNORED
    if not bool(counted.any()) or bool((counted & ((labels < 0) | (labels >= logits.shape[-1]))).any()):
        return
    yield target(), F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED)
