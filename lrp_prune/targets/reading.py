"""What labels are about: by the model's own loss, else by what it was made for, else by their structure."""

from typing import Any

from torch import Tensor, nn

from lrp_prune.models.batches import entry
from lrp_prune.models.binding import Call
from lrp_prune.models.profile import Profile, profile_of
from lrp_prune.targets.alignment import classes_last
from lrp_prune.targets.classes import ClassLabel, MultiLabel, are_shares
from lrp_prune.targets.looking import Seen, token_ids
from lrp_prune.targets.losses import readings_by_loss
from lrp_prune.targets.naming import Target, target_called
from lrp_prune.targets.structure import NeedsOrder, Reading, Unclear, are_binary, by_structure, relation_of
from lrp_prune.targets.tokens import NextToken, TokenLabel
from lrp_prune.targets.values import PredictedValues

__all__ = ["NeedsOrder", "Reading", "Unclear", "known_without_labels", "no_target", "with_labels", "without_labels"]


def with_labels(model: nn.Module, call: Call, labels: Tensor, seen: Seen) -> Reading | NeedsOrder:
    """The reading of labels.

    Args:
        model: what is run.
        call: with the whole batch.
        labels: its labels.
        seen: what the model made of a part of it.

    Raises:
        Unclear: if there is none, or several.
    """
    profile, ids, reading = profile_of(model), token_ids(call, labels), None
    if seen.loss is not None and seen.logits is not None and seen.labels is not None:
        agreeing = readings_by_loss(model, seen.batch, seen.logits, seen.labels, seen.loss)
        if len(agreeing) == 1:
            reading = Reading(agreeing[0], "the model's own loss")
    if reading is None and seen.own and profile.kind is not None:
        target = _by_kind(profile, labels, seen.logits)
        reading = Reading(target, profile.known_as) if target is not None else None
    if reading is None:
        return by_structure(profile, seen.logits, labels, ids)
    shifts = isinstance(reading.target, NextToken) and not profile.encoder_decoder
    if shifts and ids is not None and relation_of(ids, labels) == "shifted":
        return Reading(TokenLabel(), "labels that are the input ids shifted by one already")
    if seen.own and not seen.by_module:
        _check_problem_type(profile, labels)
    return reading


def _by_kind(profile: Profile, labels: Tensor, logits: Tensor | None) -> Target | None:
    """The target of what the model was made for; None if labels and outputs are of another shape.

    Raises:
        Unclear: if there is no target for such a model.
    """
    assert profile.kind is not None
    if not profile.kind.targets:
        raise Unclear(no_target(profile))
    usual = profile.kind.targets[0]
    if usual == "span":
        raise Unclear(f"{profile.known_as}, which needs start_positions and end_positions")
    if usual in ("next_token", "token"):
        if logits is None or labels.is_floating_point():
            return None
        rows = min(len(logits), len(labels))
        fitting = classes_last(logits[:rows], labels[:rows], profile)
        if fitting is not None and fitting.shape[-1] == 1 and "multi_label" in profile.kind.targets:
            return MultiLabel()
        return target_called(usual) if fitting is not None and (usual == "token" or fitting.dim() == 3) else None
    if usual == "class" and "multi_label" in profile.kind.targets:
        return _by_problem_type(profile, labels)
    return target_called(usual)


def no_target(profile: Profile) -> str:
    """Why a model of its kind is not explained without being told how."""
    return f"{profile.known_as}, for which no target is known"


def _by_problem_type(profile: Profile, labels: Tensor) -> Target:
    """As transformers takes the labels of a classifier."""
    said = getattr(profile.config, "problem_type", None)
    if said == "regression" or (said is None and profile.config.num_labels == 1):
        return PredictedValues()
    several = said == "multi_label_classification" or (said is None and labels.is_floating_point())
    return MultiLabel() if several else ClassLabel()


def _check_problem_type(profile: Profile, labels: Tensor) -> None:
    """Refuse labels that a classifier's configuration says nothing about, where its loss is a guess of transformers.

    Raises:
        Unclear: if they may be meant in another way.
    """
    if profile.kind is None or "multi_label" not in profile.kind.targets or "class" not in profile.kind.targets:
        return
    if getattr(profile.config, "problem_type", None) is not None:
        return
    if labels.dim() == 2 and labels.shape[1] > 1 and are_shares(labels):
        raise Unclear("each row of the labels sums to one, and config.problem_type is not set", "class", "multi_label")
    if profile.config.num_labels == 1 and are_binary(labels):
        raise Unclear("the labels are 0 or 1, and config.problem_type is not set", "multi_label", "regression")


def known_without_labels(profile: Profile, batch: Any) -> bool:
    """Whether what is explained needs no labels: a language model's text, a regression's values."""
    if profile.causal:
        return isinstance(entry(batch, "input_ids"), Tensor)
    if profile.kind is None or profile.config is None:
        return False
    said = getattr(profile.config, "problem_type", None)
    one = "class" in profile.kind.targets and said is None and profile.config.num_labels == 1
    return profile.kind.targets == ("regression",) or said == "regression" or (one and len(profile.kind.targets) > 2)


def without_labels(profile: Profile, batch: Any, seen: Seen | None) -> Reading | NeedsOrder:
    """What is explained of a batch without labels.

    Raises:
        Unclear: if nothing can be without them.
    """
    if known_without_labels(profile, batch):
        target: Target = NextToken() if profile.causal else PredictedValues()
        return Reading(target, profile.known_as)
    ids, logits = entry(batch, "input_ids"), seen.logits if seen is not None else None
    tokens = isinstance(ids, Tensor) and profile.kind is None
    if tokens and logits is not None and logits.dim() == 3 and logits.shape[2] > int(ids.max()):
        return NeedsOrder(
            Reading(NextToken(), "token ids without labels, and a model that reads from left to right"), None
        )
    raise Unclear("there are none to read, and the model alone does not say what to explain")
