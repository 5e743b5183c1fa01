"""Calling a model with a batch as its own steps do.

Nothing is tried out: what a call is follows from the names and the structure of the batch and from the signature of the
forward, and is checked against it, before the model is run.
"""

import inspect
import re
from typing import Any

from torch import Tensor, nn

from lrp_prune.models.batches import fields, label_name
from lrp_prune.models.binding import Call, Signature, by_name, of_pair
from lrp_prune.models.profile import profile_of
from lrp_prune.models.subject import forwarded
from lrp_prune.models.wording import WAY_OUT, described
from lrp_prune.names import class_name, unwrap

_MISFIT = re.compile("type|shape|size|dim|channels|indices")
"""What torch says where a tensor is not what an operation takes."""


def call_of(model: nn.Module, batch: Any, labelled: bool = False) -> Call:
    """What a model is called with for a batch.

    - A mapping, a named tuple, a dataclass or an object with attributes: by name, what the forward takes; all of it (labels
      included) where the forward takes ``**kwargs``; the whole batch, or its only entry besides the labels, where the forward
      has one required parameter that no entry is named after.
    - A pair: inputs and labels. Inputs that are a tuple are unpacked for a forward with as many parameters, those with
      names are passed by name. A forward that requires two inputs is given both.
    - Anything else: as it is.

    Of a ``LightningModule`` without a ``forward`` it is the model that it holds (:func:`~lrp_prune.models.subject.forwarded`).

    A Hugging Face model is called without labels, since its loss would cost copies of the logits; the decoder's inputs of an
    encoder-decoder are made from them as the model itself makes them.

    Args:
        model: any module.
        batch: as its training has it.
        labelled: give the forward labels wherever it can take them, for its own loss.

    Raises:
        ValueError: if the batch does not fit the forward.

    Example:
        >>> call_of(nn.Linear(2, 2), ("inputs", "labels"))[:3]
        (('inputs',), {}, 'labels')
    """
    profile, named = profile_of(forwarded(model)), fields(batch)
    if isinstance(batch, tuple | list):
        names = Signature(profile).names
        read = named is not None and (label_name(named) is not None or any(name in names for name in named))
        call = by_name(profile, batch, None, labelled) if read else of_pair(profile, batch, labelled)
    else:
        call = Call((batch,), {}) if named is None else by_name(profile, batch, None, labelled)
    if profile.inner is profile.module:
        _check_tokens(call.kwargs.get("input_ids"), "input_ids")
    _check(profile.module, call, batch)
    return call


def run(model: nn.Module, batch: Any) -> Any:
    """Call the model with a batch, without caches: see :func:`call_of`.

    Left-padded batches of decoders get position ids that count attended tokens only, as in generation.

    Raises:
        ValueError: if the batch does not fit the model's forward.
    """
    return called(model, call_of(model, batch))


def called(model: nn.Module, call: Call) -> Any:
    """The output of a call; where something was assumed, an error of the forward says so."""
    model, assumed = forwarded(model), call.assumed
    try:
        return model(*call.args, **call.kwargs)
    except (TypeError, AttributeError, KeyError, IndexError, ValueError, RuntimeError) as error:
        unpacks = isinstance(error, ValueError) and "to unpack" in str(error)
        fits = isinstance(error, RuntimeError) and not (type(error) is RuntimeError and _MISFIT.search(str(error)))
        if unpacks and assumed is None and call.labels is not None:
            assumed = "It may want the whole batch, and was given it without what was taken for labels"
        elif assumed is None and call.labels is not None and isinstance(error, RuntimeError):
            given = described((*call.args, *call.kwargs.values()))
            assumed = f"It was given {given}, and for labels was taken {described(call.labels)}"
        if assumed is None or fits or (isinstance(error, ValueError) and not unpacks):
            raise
        raise ValueError(
            f"{class_name(unwrap(model))}.forward failed ({type(error).__name__}: {error}). {assumed}; if that is not what "
            f"its training does, {WAY_OUT}"
        ) from error


def labels_of(model: nn.Module, batch: Any) -> Tensor | None:
    """The batch's labels, if they are a tensor."""
    labels = call_of(model, batch).labels
    return labels if isinstance(labels, Tensor) else None


def _check_tokens(ids: Any, name: str) -> None:
    """Refuse tokens without a dimension for samples, and none at all."""
    if isinstance(ids, Tensor) and (ids.dim() == 1 or not ids.numel()):
        what = (
            "is one sample: add a dimension for samples (value[None] of each entry)" if ids.numel() else "has no tokens"
        )
        raise ValueError(f"{name} must be [samples, tokens], and of shape {tuple(ids.shape)} it {what}")


def _check(module: nn.Module, call: Call, batch: Any) -> None:
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):  # that of a scripted module
        return
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise ValueError(
            f"{class_name(module)}.forward{signature} cannot be called with this batch ({described(batch)}): {error}. Name the "
            f"batch's entries after its parameters, or {WAY_OUT}"
        ) from error
