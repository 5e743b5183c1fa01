"""Which entry of a batch goes to which parameter of a module's forward; Hugging Face models have their own way."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrp_prune.models.batches import LABELS, SPANS, fields, label_name
from lrp_prune.models.positions import counted_positions
from lrp_prune.models.profile import Profile, parameters_of
from lrp_prune.models.wording import WAY_OUT, described, listed

_WHOLE = frozenset("batch data sample samples example examples item items minibatch".split())
_WHOLE_PAIR = frozenset({"batch", "minibatch"})
_TENSORS = (torch.Tensor, "Tensor", "torch.Tensor")
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Call(NamedTuple):
    """How a model is called with a batch."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    labels: Any = None
    """What the batch has as labels, whether or not the forward is given them."""
    spare: str | None = None
    """The argument that holds labels which the forward can do without."""
    assumed: str | None = None
    """What was taken for granted that no name says."""


class Signature:
    """What a module's forward takes."""

    def __init__(self, profile: Profile) -> None:
        parameters = parameters_of(profile.module)
        if profile.hands_on and profile.inner is not None:
            parameters = {**parameters_of(profile.inner), **parameters}
        self.parameters = parameters
        self.names = [name for name, parameter in parameters.items() if parameter.kind in _BY_NAME]
        self.labels = next((name for name in self.names if name in LABELS), None)
        self.required = [
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty and parameter.kind in (*_BY_NAME, inspect.Parameter.POSITIONAL_ONLY)
        ]
        kinds = {parameter.kind for parameter in parameters.values()}
        self.takes_all = inspect.Parameter.VAR_KEYWORD in kinds
        self.takes_any_number = inspect.Parameter.VAR_POSITIONAL in kinds


def by_name(profile: Profile, batch: Any, labels: Any, labelled: bool) -> Call:
    """The call for a batch whose entries have names; ``labels`` are those of a pair, beside it."""
    named = fields(batch) or {}
    key = label_name(named) if labels is None else None
    labels = labels if key is None else named[key]
    inputs = {name: value for name, value in named.items() if name not in (*LABELS, *SPANS)}
    only = next(iter(inputs.values())) if len(inputs) == 1 else None
    signature = Signature(profile)
    if profile.hands_on:
        if fields(only) is not None and not set(inputs) & set(signature.names):
            return by_name(profile, only, labels, labelled)
        return _to_hugging_face(profile, signature, named, inputs, labels, labelled)
    if signature.takes_all:
        if fields(only) is not None and not set(inputs) & set(signature.names):
            named = {**(fields(only) or {}), **({key: labels} if key is not None else {})}
        given_labels = any(name in named for name in LABELS)
        extra = {} if given_labels or not _needs_labels(profile, named) else {"labels": labels}
        return Call((), {**named, **extra}, labels, assumed="It was given all that the batch has, labels included")
    matched = {name: named[name] for name in signature.names if name in inputs}
    missing = [name for name in signature.required if name not in matched and name != signature.labels]
    given, spare = _labels_for(profile, signature, labels, labelled)
    if matched and not missing:
        return Call((), {**matched, **given}, labels, spare)
    if not matched and len(missing) == 1:
        wanted = signature.parameters[missing[0]]
        nested = fields(only)
        if len(inputs) != 1 or _wants_whole(wanted):
            return Call((batch,), given, labels, spare, f"It was given the whole batch as {missing[0]!r}")
        if nested is None or _wants_mapping(wanted) or missing[0] not in nested:
            name = next(iter(inputs))
            return Call((only,), given, labels, spare, f"It was given the batch's entry {name!r} as {missing[0]!r}")
    if not matched and len(inputs) == 1 and isinstance(only, tuple | list | Mapping):
        return of_pair(profile, (only, labels), labelled)
    raise ValueError(
        f"{profile.name}.forward takes {listed(signature.parameters)}, and the batch has {listed(named)}: "
        f"{f'nothing for {listed(missing)}' if matched else 'no entry fits'}. Name the entries after its parameters, or {WAY_OUT}"
    )


def of_pair(profile: Profile, batch: Sequence[Any], labelled: bool) -> Call:
    """The call for inputs and labels, or inputs alone."""
    if not batch:
        raise ValueError("the batch is an empty tuple: nothing to run the model on")
    if len(batch) > 2:
        raise ValueError(
            f"the batch has {len(batch)} entries ({described(batch)}), and which of them are inputs and which labels is not "
            f"known: make it a pair (inputs, labels), or a mapping with the names that {profile.name}.forward has, or {WAY_OUT}"
        )
    inputs, labels = batch[0], batch[1] if len(batch) == 2 else None
    if fields(inputs) is not None and not isinstance(inputs, tuple):
        return by_name(profile, inputs, labels, labelled)
    signature, assumed = Signature(profile), None
    args: tuple[Any, ...] = (inputs,)
    if isinstance(inputs, tuple | list):
        room = len([name for name in signature.names if name != signature.labels])
        if signature.takes_any_number or room >= len(inputs) > 1:
            args, assumed = tuple(inputs), "It was given the entries of the batch's inputs one by one"
        else:
            assumed = "It was given the batch's inputs as one argument"
    if profile.hands_on:
        given = _decoder_inputs(profile, labels, {})
        if isinstance(labels, Tensor) and (labelled or _needs_labels(profile, given)):
            given[signature.labels or "labels"] = labels
        return Call(args, {**given, **_no_cache(profile, signature)}, labels, assumed=assumed)
    required = [name for name in signature.required if name != signature.labels]
    if len(batch) == 2 and len(args) == 1 and len(required) == 2:
        return Call(
            tuple(batch), {}, None, assumed=f"It was given both entries of the batch, as {' and '.join(required)}"
        )
    given, spare = _labels_for(profile, signature, labels, labelled)
    if len(required) == 1 and len(args) == 1 and _wants_pair(signature.parameters[required[0]]):
        return Call((batch,), given, labels, spare, f"It was given the whole batch as {required[0]!r}")
    return Call(args, given, labels, spare, assumed)


def _labels_for(
    profile: Profile, signature: Signature, labels: Any, labelled: bool
) -> tuple[dict[str, Any], str | None]:
    """The labels as an argument of a module's own forward, and its name if the forward can do without."""
    own = signature.labels
    if own is None or labels is None:
        return {}, None
    spare = own not in signature.required
    if spare and profile.inner is not None and not profile.encoder_decoder and not labelled:
        return {}, None  # as for a bare Hugging Face model: its loss would cost copies of the logits
    return {own: labels}, own if spare else None


def _to_hugging_face(
    profile: Profile,
    signature: Signature,
    named: Mapping[str, Any],
    inputs: Mapping[str, Any],
    labels: Any,
    labelled: bool,
) -> Call:
    # What no signature names would be handed down to the attention.
    arguments = {name: value for name, value in inputs.items() if name in signature.names}
    if not arguments:
        raise ValueError(
            f"{profile.name}.forward takes {listed(signature.names)}, and the batch has {listed(named)}: no entry fits. Name the "
            f"entries after its parameters, or {WAY_OUT}"
        )
    arguments.update(_decoder_inputs(profile, labels, arguments))
    if signature.labels is not None and isinstance(labels, Tensor) and (labelled or _needs_labels(profile, arguments)):
        arguments[signature.labels] = labels
    if labelled:
        arguments.update({name: named[name] for name in SPANS if name in named and name in signature.names})
    arguments.update(counted_positions(profile, signature.names, arguments))
    return Call((), {**arguments, **_no_cache(profile, signature)}, labels)


def _decoder_inputs(profile: Profile, labels: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Decoder inputs of encoder-decoders, made from the labels as the model itself does."""
    prepare = getattr(profile.inner, "prepare_decoder_input_ids_from_labels", None)
    tokens = isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()
    if not tokens or not _needs_labels(profile, arguments):
        return {}
    made = _shifted(profile, labels) if prepare is None else prepare(labels=labels)
    return {} if made is None else {"decoder_input_ids": made}


def _shifted(profile: Profile, labels: Any) -> Tensor | None:
    """Labels shifted by the function that the forward of a model in this file shifts them by, Whisper's for one; None without."""
    shift = getattr(inspect.getmodule(type(profile.inner)), "shift_tokens_right", None)
    if shift is None or "decoder_input_ids" not in Signature(profile).names:
        return None
    ids = {name: getattr(profile.config, name, None) for name in list(inspect.signature(shift).parameters)[1:]}
    return None if None in ids.values() else shift(labels, **ids)


def _needs_labels(profile: Profile, arguments: Mapping[str, Any]) -> bool:
    """Whether an encoder-decoder's language model has nothing else to make its decoder's inputs from."""
    generates = profile.encoder_decoder and (profile.kind is None or "next_token" in profile.kind.targets)
    return generates and not any(name.startswith("decoder_input") for name in arguments)


def _no_cache(profile: Profile, signature: Signature) -> dict[str, Any]:
    known = "use_cache" in signature.names or (signature.takes_all and hasattr(profile.config, "use_cache"))
    return {"use_cache": False} if known else {}


def _wants_whole(parameter: inspect.Parameter) -> bool:
    """Whether a forward's only parameter is the batch, not an entry of it: by its annotation, else by its name."""
    if parameter.annotation in _TENSORS:
        return False
    return _wants_mapping(parameter) or parameter.name in _WHOLE


def _wants_pair(parameter: inspect.Parameter) -> bool:
    """Whether a forward's only parameter is inputs together with labels."""
    return parameter.name in _WHOLE_PAIR and parameter.annotation not in _TENSORS and not _wants_mapping(parameter)


def _wants_mapping(parameter: inspect.Parameter) -> bool:
    annotation = parameter.annotation
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return any(word in text for word in ("dict", "Dict", "Mapping", "BatchEncoding", "BatchFeature"))
