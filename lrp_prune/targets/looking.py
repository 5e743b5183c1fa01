"""One look at what a model makes of a few samples: its outputs, its own loss, and whether it reads from left to right."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrp_prune.models.batches import IGNORED, LABELS, SPANS, fields, mapped, of_samples, samples_in
from lrp_prune.models.binding import Call
from lrp_prune.models.calling import call_of, called, labels_of
from lrp_prune.models.kinds import SEGMENTATION
from lrp_prune.models.outputs import Inside, logits_in, noting
from lrp_prune.models.padding import attended_labels
from lrp_prune.models.profile import Profile, parameters_of, profile_of
from lrp_prune.models.states import eager, unchanged_configuration, unchanged_state
from lrp_prune.names import unwrap
from lrp_prune.targets.alignment import without_ignored

_SAMPLES = 2  # a loss makes several copies of their logits


class Seen(NamedTuple):
    """What was seen; nothing of it has a graph."""

    batch: Any
    labels: Tensor | None
    logits: Tensor | None
    output: Any
    loss: Tensor | None
    """The model's own."""
    own: bool
    """Whether the outputs are those of the Hugging Face model inside, so that its task is that of the whole."""
    by_module: bool
    """Whether the loss is one that the module around it computes."""


def look(model: nn.Module, batch: Any, ask_inside: bool = True) -> Seen:
    """Run the model, without gradients, on up to two samples of the batch, with labels where it takes them.

    The model is in evaluation mode already; its buffers and its configuration come out as they went in.

    Args:
        model: any module.
        batch: a batch.
        ask_inside: ask the Hugging Face model inside for its loss, where the module around it gives none.
    """
    part, profile = _portion(model, batch), profile_of(model)
    with (
        torch.no_grad(),
        eager(model),
        unchanged_state(unwrap(model)),
        unchanged_configuration(profile.config),
        noting(profile) as inside,
    ):
        call = call_of(model, part, labelled=True)
        try:
            output = called(model, call)
        except Exception:  # its own loss is for other labels, say: without them it may run all the same
            inside.outputs.clear()
            call = call_of(model, part)
            output = called(model, call)
        return _seen(profile, part, call, output, inside, ask_inside)


def _seen(profile: Profile, part: Any, call: Call, output: Any, inside: Inside, ask_inside: bool) -> Seen:
    labels = call.labels if isinstance(call.labels, Tensor) else None
    inner = inside.outputs[0] if len(inside.outputs) == 1 else None
    logits, loss = logits_in(output), _loss_in(output)
    if logits is None and inner is not None:
        output, logits = inner, logits_in(inner)
    elif logits is None and call.spare is not None:
        kept = {name: value for name, value in call.kwargs.items() if name != call.spare}
        output = called(profile.module, call._replace(kwargs=kept))
        logits = logits_in(output)
    own = profile.hands_on or (inner is not None and _same(logits, logits_in(inner), profile.decides_alone))
    handed_on = _loss_in(inner)
    by_module = loss is not None and not profile.hands_on and (handed_on is None or not torch.equal(loss, handed_on))
    if loss is None and own and inner is not None and ask_inside and labels is not None and logits is not None:
        loss = handed_on
        if loss is None and _in_range(profile, labels, logits):
            loss = _loss_inside(profile.inner, inside, labels)
    return Seen(part, labels, logits, output, loss, own, by_module)


def reads_left_to_right(model: nn.Module, seen: Seen, ids: Tensor | None) -> bool | None:
    """Whether no output depends on later tokens, by changing one of them; None if that cannot be tried.

    Args:
        model: as :func:`look` was given it.
        seen: what it returned.
        ids: the tokens of ``seen.batch``.
    """
    scores = _by_token(seen.logits, ids)
    if ids is None or scores is None:
        changed, places = seen.batch, None
    else:
        counted = attended_labels(model, seen.batch)
        if seen.labels is not None or counted is None:
            counted = torch.ones_like(ids, dtype=torch.bool) if seen.labels is None else seen.labels != IGNORED
        places = (torch.arange(ids.shape[1], device=ids.device) * counted).amax(-1)
        others = _other_ids(ids, places)
        changed = mapped(seen.batch, lambda tensor: others if tensor is ids else tensor)
    with torch.no_grad(), eager(model), unchanged_state(unwrap(model)), noting(profile_of(model)) as inside:
        output = called(model, call_of(model, changed))
    after = logits_in(output)
    if after is None and len(inside.outputs) == 1:
        after = logits_in(inside.outputs[0])
    after = _by_token(after, ids)
    if places is None or scores is None or after is None or not bool((places > 0).any()):
        return None
    moved = (after - scores).abs().amax(-1).double()
    before = torch.arange(moved.shape[1], device=moved.device) < places.to(moved.device)[:, None]
    at_place = moved.gather(1, places.to(moved.device)[:, None])
    return bool((moved * before).max() <= 1e-4 * at_place.max()) if bool(at_place.any()) else None


def _by_token(logits: Tensor | None, ids: Tensor | None) -> Tensor | None:
    """Scores as ``[samples, tokens, classes]``, whichever of the last two comes first; None if they are not about tokens."""
    if logits is None or ids is None or logits.dim() != 3:
        return None
    return next((each for each in (logits, logits.transpose(1, 2)) if each.shape[:2] == ids.shape), None)


def token_ids(call: Call, labels: Tensor | None) -> Tensor | None:
    """The tokens that a model is called with, of the labels' shape if there are labels; None if there are none."""
    named = {**{str(index): value for index, value in enumerate(call.args)}, **call.kwargs}
    for value in list(named.values()):
        named.update(fields(value) or {})
    if isinstance(named.get("input_ids"), Tensor):
        named = {"input_ids": named["input_ids"]}
    for name, value in named.items():
        aside = name in (*LABELS, *SPANS) or any(word in name for word in ("mask", "type", "position"))
        if aside or not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
            continue
        if value.dim() == 2 and (labels is None or value.shape == labels.shape):
            return value
    return None


def _portion(model: nn.Module, batch: Any) -> Any:
    """A few samples of the batch, those with the most labels; all of it where it cannot be divided."""
    labels = labels_of(model, batch)
    if labels is None or labels.dim() == 0:
        part = of_samples(batch, range(_SAMPLES)) if samples_in(batch) > _SAMPLES else None
    else:
        counted = (labels != IGNORED).view(len(labels), -1).sum(1)
        best = sorted(counted.topk(min(_SAMPLES, len(labels))).indices.tolist())
        part = of_samples(batch, best) if len(labels) > _SAMPLES else None
    return batch if part is None else part


def _other_ids(ids: Tensor, places: Tensor) -> Tensor:
    """The same tokens but for one of each sample, which is another that occurs, or its neighbour in the vocabulary."""
    result = ids.clone()
    for row, place in enumerate(places.tolist()):
        token = int(ids[row, place])
        different = ids[ids != token]
        result[row, place] = int(different[0]) if len(different) else max(token - 1, 0) or int(token == 0)
    return result


def _loss_in(output: Any) -> Tensor | None:
    """A scalar in an output: its ``loss``, itself, or the first of a tuple."""
    named = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    entries = [named] if named is not None else list(output) if isinstance(output, tuple | list) else [output]
    scalars = (entry for entry in entries if isinstance(entry, Tensor) and entry.is_floating_point())
    return next((entry for entry in scalars if entry.dim() == 0), None)


def _loss_inside(inner: nn.Module | None, inside: Inside, labels: Tensor) -> Tensor | None:
    """The loss of the Hugging Face model inside, called as it was, with labels."""
    if inner is None or "labels" not in parameters_of(inner):
        return None
    try:
        return _loss_in(inner(*inside.args, **{**inside.kwargs, "labels": labels}))
    except Exception:  # labels of another kind than its own
        return None


def _in_range(profile: Profile, labels: Tensor, logits: Tensor) -> bool:
    """Whether labels may be classes of these logits: others end the process on a GPU."""
    classes = logits.shape[1 if profile.kind == SEGMENTATION else -1]
    if labels.is_floating_point() or classes == 1:
        return True
    return int(without_ignored(labels, profile).max()) < classes


def _same(outer: Tensor | None, inner: Tensor | None, alone: bool) -> bool:
    """Whether the outputs of the whole are those of the model inside."""
    if outer is None or inner is None:
        return alone and outer is inner
    if outer.shape != inner.shape:
        return False
    return alone or outer is inner or torch.equal(outer, inner)
