"""The target that fits a model and its labels, decided on the first batch."""

import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrp_prune.distributed.sharding import all_gathered, is_first
from lrp_prune.models.calling import call_of
from lrp_prune.models.profile import Profile, profile_of
from lrp_prune.models.wording import WAY_OUT
from lrp_prune.targets.alignment import shape_of
from lrp_prune.targets.looking import Seen, look, reads_left_to_right, token_ids
from lrp_prune.targets.naming import TARGETS, Target, describe, in_words
from lrp_prune.targets.reading import (
    NeedsOrder,
    Reading,
    Unclear,
    known_without_labels,
    no_target,
    with_labels,
    without_labels,
)
from lrp_prune.targets.spans import AnswerSpan, span_positions

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_logger = logging.getLogger("lrp_prune")


class Inferred:
    """The target that fits the first batch of a model; what decides is, in this order:

    1. the model's own loss, where it computes one from the labels: it equals the loss of one reading of them;
    2. what the model was made for, by transformers' tables and its configuration, through whatever is around it;
    3. the shapes of outputs and labels, whether labels are the input ids (or these shifted by one), and whether the model
       reads from left to right.

    What is decided is told once by the logger ``lrp_prune``. One object may serve several collections, such as the rounds of a
    pruning: it decides once for a model.

    Args:
        tells: whether what is decided is told.

    Example:
        >>> inferred = Inferred()
        >>> inferred.decide(nn.Linear(2, 3), (torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])))
        ClassLabel()
        >>> inferred.words
        "the logit of each sample's class"
    """

    def __init__(self, tells: bool = True) -> None:
        self._tells = tells
        self._chosen: Target | None = None
        self._model: weakref.ref[nn.Module] | None = None

    @property
    def words(self) -> str:
        """What is explained; empty before the first batch."""
        return in_words(describe(self._chosen)) if self._chosen is not None else ""

    def decide(self, model: nn.Module, batch: Any, mesh: "DeviceMesh | None" = None) -> Target:
        """The target, from this batch if it is the first of this model.

        Args:
            model: in evaluation mode.
            batch: on the model's device.
            mesh: the processes that a sharded model is divided among, which must decide alike.

        Raises:
            ValueError: if it cannot be told, with what to pass; or if processes decide differently.
        """
        known = self._model() if self._model is not None else None
        if self._chosen is None or known is not model:
            reading = _decided(model, batch, mesh)
            self._chosen, self._model = reading.target, weakref.ref(model)
            if self._tells:
                _tell(reading, mesh)
        return self._chosen

    def __getstate__(self) -> dict[str, Any]:
        return {"_chosen": None, "_model": None, "_tells": self._tells}  # a reference cannot go to another process

    def __repr__(self) -> str:
        return f"Inferred({describe(self._chosen) if self._chosen is not None else ''})"


def _tell(reading: Reading, mesh: "DeviceMesh | None") -> None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if is_first(mesh) if mesh is not None else not distributed or torch.distributed.get_rank() == 0:
        name = describe(reading.target)
        _logger.info("explains: %s (target=%r, by %s)", in_words(name), name, reading.evidence)


def _decided(model: nn.Module, batch: Any, mesh: "DeviceMesh | None") -> Reading:
    """The reading of this process's batch, which must be that of all others; all run the model as often."""
    profile, call, positions = profile_of(model), call_of(model, batch), span_positions(batch)
    labels = call.labels if isinstance(call.labels, Tensor) else None
    kind = None if labels is None else (labels.dim(), str(labels.dtype))
    _same_everywhere((kind, positions is None, known_without_labels(profile, batch)), "labels of one kind", mesh)
    seen: Seen | None = None
    outcome: Reading | NeedsOrder | Unclear | Exception
    try:
        if labels is None and (positions is not None or known_without_labels(profile, batch)):
            outcome = _without_a_look(profile, batch, positions is not None)
        elif labels is None and call.labels is not None:
            outcome = Unclear(f"the labels are a {type(call.labels).__name__}, and a target needs a tensor")
        elif labels is None and profile.kind is not None:
            outcome = Unclear(f"{profile.known_as}, which needs labels" if profile.kind.targets else no_target(profile))
        else:
            seen = look(model, batch, ask_inside=mesh is None)
            read = without_labels(profile, batch, seen) if labels is None else with_labels(model, call, labels, seen)
            outcome = read
    except Unclear as unclear:
        outcome = unclear
    except Exception as error:  # the other processes have to hear of it
        outcome = error
    undecided = _gathered(isinstance(outcome, NeedsOrder), mesh)
    if any(undecided) and seen is not None:
        left_to_right = reads_left_to_right(model, seen, token_ids(call_of(model, seen.batch), seen.labels))
        if isinstance(outcome, NeedsOrder):
            outcome = outcome.decided(left_to_right)
    name = describe(outcome.target) if isinstance(outcome, Reading) else None
    names = _gathered(name, mesh)
    if isinstance(outcome, Unclear):
        raise ValueError(_refusal(profile, call.labels, outcome))
    if isinstance(outcome, Exception):
        raise outcome
    assert isinstance(outcome, Reading)
    if None in names:
        raise RuntimeError("what to explain cannot be told in another process: its error says why")
    _same_everywhere(name, "one target", mesh)
    return outcome


def _without_a_look(profile: Profile, batch: Any, spans: bool) -> Reading | NeedsOrder | Unclear:
    if spans:
        return Reading(AnswerSpan(), "start and end positions in the batch")
    return without_labels(profile, batch, None)


def _gathered(value: Any, mesh: "DeviceMesh | None") -> list[Any]:
    return [value] if mesh is None else all_gathered(value, mesh)


def _same_everywhere(value: Any, what: str, mesh: "DeviceMesh | None") -> None:
    """Refuse processes that would run a sharded model differently, or explain different things.

    Raises:
        ValueError: in all processes.
    """
    everyone = _gathered(value, mesh)
    if any(other != everyone[0] for other in everyone):
        different = ", ".join(dict.fromkeys(map(str, everyone)))
        raise ValueError(
            f"the first batches of the processes do not have {what} ({different}), so that what to explain is not inferred "
            "alike: pass target="
        )


def _refusal(profile: Profile, labels: Any, unclear: Unclear) -> str:
    held = (
        "no labels" if labels is None else f"labels {shape_of(labels)}" if isinstance(labels, Tensor) else "such labels"
    )
    start = f"what to explain cannot be inferred for {profile.name} and a batch with {held}: {unclear}"
    if unclear.possible:
        readings = " and ".join(f"target={name!r} ({in_words(name)})" for name in unclear.possible)
        return f"{start}, so that both {readings} are possible: pass target= with the one that is meant, or {WAY_OUT}"
    if profile.kind is not None and not profile.kind.targets:
        return f"{start}: {WAY_OUT}"
    return f"{start}: pass target= with one of {', '.join(map(repr, TARGETS))}, or {WAY_OUT}"
