"""What labels are about, by the shapes and the values of labels and outputs alone."""

from typing import Any, NamedTuple

from torch import Tensor

from lrp_prune.models.batches import IGNORED
from lrp_prune.models.profile import Profile
from lrp_prune.targets.alignment import aligned, classes_last, per_sample, shape_of
from lrp_prune.targets.classes import ClassLabel, MultiLabel, are_shares
from lrp_prune.targets.naming import Target
from lrp_prune.targets.tokens import NextToken, TokenLabel
from lrp_prune.targets.values import PredictedValues


class Unclear(Exception):  # noqa: N818  # an answer, not an error
    """The target cannot be told; with the names of those that are possible."""

    def __init__(self, reason: str, *possible: str) -> None:
        super().__init__(reason)
        self.possible = possible


class Reading(NamedTuple):
    """A target, and what speaks for it."""

    target: Target
    evidence: str


class NeedsOrder(NamedTuple):
    """What decides is whether the model reads from left to right: ``causal`` if it does, ``other`` if it does not."""

    causal: Reading | None
    other: Reading | None

    def decided(self, left_to_right: bool | None) -> "Reading | Unclear":
        """The reading, once that is known; None: it could not be tried."""
        reading = self.causal if left_to_right else self.other
        if left_to_right is not None and reading is not None:
            return reading
        if self.other is None:
            return Unclear("there are no labels, and tokens see those after them")
        why = "it reads from left to right" if left_to_right else "whether it reads from left to right cannot be tried"
        return Unclear(f"labels are input ids in part or in whole, and {why}", "next_token", "token")


def by_structure(profile: Profile, logits: Any, labels: Tensor, ids: Tensor | None) -> Reading | NeedsOrder:
    """The reading of labels that fits the outputs.

    Args:
        profile: of the model.
        logits: its outputs on samples like these.
        labels: the batch's.
        ids: the tokens that the labels are beside, if there are any.

    Raises:
        Unclear: if none fits, or several.
    """
    if not isinstance(logits, Tensor):
        raise Unclear("the model returns nothing that is known to be its predictions")
    if labels.dim() == 0:
        raise Unclear("one label is not one for each sample")
    if labels.is_floating_point() or labels.shape[1:] == logits.shape[1:]:
        return _by_values(profile, logits, labels)
    if labels[:1].numel() == 1 and logits.dim() <= 2:
        return _by_classes(logits, labels.view(-1))
    rows = min(len(logits), len(labels))
    try:
        fitting = classes_last(logits[:rows], labels[:rows], profile)
    except ValueError as error:
        raise Unclear(str(error)) from error
    if fitting is None:
        raise Unclear(f"labels {shape_of(labels)} fit no target for outputs {per_sample(logits)}")
    if fitting.shape[-1] == 1:
        raise Unclear(f"one output is no choice: give labels of 0 and 1 the shape of the outputs, {per_sample(logits)}")
    if ids is None:
        return Reading(TokenLabel(), "the shapes of outputs and labels")
    return _by_order(ids, labels)


def _by_classes(logits: Tensor, labels: Tensor) -> Reading:
    classes = logits.shape[1] if logits.dim() == 2 else 1
    if classes == 1:
        return _by_range(labels)
    if int(labels.max()) >= classes or int(labels.masked_fill(labels == IGNORED, 0).min()) < 0:
        raise Unclear(f"labels between {int(labels.min())} and {int(labels.max())} are no classes of {classes} outputs")
    return Reading(ClassLabel(), "one integer label a sample")


def _by_values(profile: Profile, logits: Tensor, labels: Tensor) -> Reading:
    rows = min(len(logits), len(labels))
    if aligned(logits[:rows], labels[:rows], profile) is None:
        raise Unclear(
            f"labels {shape_of(labels)} are neither of the shape of the outputs {per_sample(logits)}, nor [samples] for "
            "[samples, 1]"
        )
    binary = are_binary(labels)
    if labels.dim() == 2 and labels.shape[1] > 1 and are_shares(labels):
        other = "multi_label" if binary else "regression"
        raise Unclear("each row of the labels sums to one", "class", other)
    return _by_range(labels)


def _by_range(labels: Tensor) -> Reading:
    if are_binary(labels):
        return Reading(MultiLabel(), "labels that are 0 or 1, one for each output")
    return Reading(PredictedValues(), "labels that are numbers, one for each output")


def are_binary(labels: Tensor) -> bool:
    """Whether labels are zeros and ones only, but for what is left out."""
    return bool(((labels == 0) | (labels == 1) | (labels == IGNORED)).all())


def _by_order(ids: Tensor, labels: Tensor) -> Reading | NeedsOrder:
    """By what labels have to do with the tokens that they are beside."""
    relation = relation_of(ids, labels)
    if relation == "shifted":
        return Reading(TokenLabel(), "labels that are the input ids shifted by one already")
    if relation == "unrelated":
        return Reading(TokenLabel(), "labels that are not the input ids")
    own = Reading(TokenLabel(), "a model in which tokens see those after them")
    if relation == "same":
        return NeedsOrder(
            Reading(NextToken(), "labels that are the input ids, and a model that reads from left to right"), own
        )
    return NeedsOrder(None, own)


def relation_of(ids: Tensor, labels: Tensor) -> str:
    """What labels ``[samples, tokens]`` are to the tokens beside them, where they count.

    Returns:
        ``"same"``: these tokens; ``"shifted"``: the ones after them; ``"unrelated"``: neither, but by chance; ``"unclear"``.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> relation_of(ids, ids), relation_of(ids, torch.tensor([[6, 7, 8, 2]])), relation_of(ids, torch.tensor([[0, 1, 1, 0]]))
        ('same', 'shifted', 'unrelated')
    """
    ids, counted = ids.to(labels.device), labels != IGNORED
    # What follows a sample's last label is padding, or not in the batch.
    behind = counted.long().flip(1).cumsum(1).flip(1) > 1
    inner = (counted & behind)[:, :-1]
    own = (labels == ids)[counted]
    following = (labels[:, :-1] == ids[:, 1:])[inner]
    same, shifted = bool(own.all()), len(following) > 0 and bool(following.all())
    if same != shifted:
        return "same" if same else "shifted"
    shares = [float(each.float().mean()) for each in (own, following) if len(each)]
    if same or not shares:
        return "unclear"
    return "unrelated" if max(shares) < 0.5 else "unclear"
