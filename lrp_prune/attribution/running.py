"""Running a model on a batch: what is called with what, for Hugging Face models, plain modules and LightningModules."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrp_prune.names import unwrap

IGNORED = -100
"""The label of positions that are not explained."""

_LABELS = ("labels", "label", "label_ids", "targets", "target", "y")


class Subject(NamedTuple):
    """What is explained: the module whose forward runs (names are relative to it), and its own target, if it defines one."""

    module: nn.Module
    own_target: Any


def subject_of(model: nn.Module) -> Subject:
    """Work out what of a module is run.

    A ``LightningModule`` may define ``relevance_target(batch)``; else what is run is :func:`forwarded`.
    ``validation_step`` is never run.

    Raises:
        ValueError: if a LightningModule says nothing about it.
    """
    model = unwrap(model)
    own = getattr(model, "relevance_target", None)
    if not callable(own):
        return Subject(forwarded(model), None)

    def relevance_target(_: nn.Module, batch: Any) -> Any:
        return own(batch)

    return Subject(model, relevance_target)


def forwarded(model: nn.Module) -> nn.Module:
    """The module whose forward takes a batch: of a ``LightningModule`` without a ``forward`` the model that it holds.

    Of several children that is the only ``PreTrainedModel``, or the only one with parameters.

    Raises:
        ValueError: if there is no such model.
    """
    model = unwrap(model)
    if not any(base.__name__ == "LightningModule" for base in type(model).__mro__):
        return model
    definer = next(base for base in type(model).__mro__ if "forward" in vars(base))
    if definer.__name__ != "LightningModule" and definer is not nn.Module:
        return model
    children = [child for child in model.children() if next(child.parameters(), None) is not None]
    pretrained = [child for child in children if _is_pretrained(child)]
    for candidates in (pretrained, children):
        if len(candidates) == 1:
            return unwrap(candidates[0])
    raise ValueError(
        f"{type(model).__name__} does not say what to run for relevance: define forward(), or relevance_target(batch) "
        "that runs the model and returns the scalar to explain"
    )


def is_compiled(model: nn.Module) -> bool:
    """Also where only a forward is, as Lightning leaves a module that was compiled before it was given to a trainer."""
    return any(
        hasattr(module, "_orig_mod")
        or module._compiled_call_impl is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Runs what is compiled as it is written: compiled calls pass by hooks that were registered later."""
    if not is_compiled(model):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _is_pretrained(model: nn.Module) -> bool:
    return any(base.__name__ == "PreTrainedModel" for base in type(unwrap(model)).__mro__)


def entry(batch: Any, name: str) -> Any:
    """The batch's entry of that name, None if there is none."""
    return batch.get(name) if isinstance(batch, Mapping) else None


def labels_of(batch: Any) -> Tensor | None:
    """The labels: by name in a mapping, else the second of a pair."""
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in _LABELS if name in batch), None)
    else:
        found = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    return found if isinstance(found, Tensor) else None


def is_causal(model: nn.Module) -> bool:
    """Whether the model predicts each token from those before it, by the names that Hugging Face gives such models."""
    name = type(unwrap(model)).__name__
    return "ForCausalLM" in name or "LMHead" in name


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the labels are tokens of a decoder, beside those that an encoder is given."""
    # The outermost that says: a module around it may have a configuration of another kind, and its encoder says no.
    said = (getattr(getattr(module, "config", None), "is_encoder_decoder", None) for module in unwrap(model).modules())
    return bool(next((answer for answer in said if answer is not None), False))


def attended_labels(model: nn.Module, batch: Any) -> Tensor | None:
    """Which positions of the logits ``[samples, tokens]`` are no padding; None if the batch does not say.

    Of an encoder-decoder the attention mask is about the encoder's tokens; the decoder has a mask of its own, or its labels.
    """
    if not is_encoder_decoder(model):
        mask, ids = entry(batch, "attention_mask"), entry(batch, "input_ids")
        return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 and ids is not None else None
    mask, labels = entry(batch, "decoder_attention_mask"), labels_of(batch)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask != 0
    return labels != IGNORED if labels is not None and labels.dim() == 2 and not labels.is_floating_point() else None


def counted_tokens(model: nn.Module, batch: Any, skip_first: int) -> Tensor | None:
    """Which tokens ``[samples, tokens]`` enter statistics: attended ones, without each sample's first; None for all.

    Of an encoder-decoder only the encoder's are left out, and none where its decoder has as many, since activations are told
    apart by their shape.
    """
    mask, ids = entry(batch, "attention_mask"), entry(batch, "input_ids")
    attended = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if attended is not None and is_encoder_decoder(model):
        decoded = next((batch[name] for name in ("decoder_input_ids", *_LABELS) if name in batch), None)
        if not isinstance(decoded, Tensor) or decoded.shape == attended.shape:
            attended = None
    skipped = skip_first if is_causal(model) and isinstance(ids, Tensor) and ids.dim() == 2 else 0
    if attended is None:
        if not skipped:
            return None
        attended = torch.ones_like(ids)
    counted = (attended != 0) & (attended.long().cumsum(-1) > skipped)
    return None if bool(counted.all()) else counted


def run(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch without labels and caches.

    A mapping is passed by name (entries that the forward does not take are dropped); of a tuple or list the first entry;
    anything else as it is. Left-padded causal batches get position ids that count attended tokens only, as in generation.
    """
    if isinstance(batch, Mapping):
        taken = inspect.signature(unwrap(model).forward).parameters
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        anything = open_ended and not _is_pretrained(
            model
        )  # Hugging Face models hand unknown arguments down to their attention
        arguments = {
            name: value for name, value in batch.items() if name not in _LABELS and (name in taken or anything)
        }
        if not arguments:
            raise ValueError(
                f"{type(model).__name__}.forward takes {tuple(taken)}, the batch has {tuple(batch)}: no entry fits"
            )
        arguments.update(_decoder_inputs(model, batch, arguments))
        mask = entry(batch, "attention_mask")
        if (
            mask is not None
            and "position_ids" in taken
            and "position_ids" not in arguments
            and mask.dim() == 2
            and bool((mask[:, 0] == 0).any())
        ):
            arguments["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        if "use_cache" in taken or (open_ended and hasattr(getattr(model, "config", None), "use_cache")):
            arguments["use_cache"] = False
        return model(**arguments)
    if isinstance(batch, tuple | list):
        if not batch:
            raise ValueError("the batch is an empty tuple: nothing to run the model on")
        return model(batch[0])
    return model(batch)


def _decoder_inputs(model: nn.Module, batch: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Decoder inputs of encoder-decoders, made from the labels as the model itself does."""
    labels, prepare = labels_of(batch), getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if not is_encoder_decoder(model) or "decoder_input_ids" in arguments or labels is None or prepare is None:
        return {}
    return {"decoder_input_ids": prepare(labels=labels)}


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: itself, its ``logits``, or its first entry.

    Raises:
        ValueError: if there is none.
    """
    for candidate in (output, getattr(output, "logits", None), entry(output, "logits")):
        if isinstance(candidate, Tensor):
            return candidate
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise ValueError(
        f"the model returned {type(output).__name__} without logits: pass target=, a function of model and batch"
    )


def samples_in(batch: Any) -> int:
    """Number of samples: the first dimension of the first tensor.

    Raises:
        ValueError: if the batch holds no tensor.
    """
    first = next(_tensors(batch), None)
    if first is None or first.dim() == 0:
        raise ValueError(f"the batch ({type(batch).__name__}) holds no tensor with a batch dimension")
    return int(first.shape[0])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for name in value:
            yield from _tensors(value[name])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def to_device(value: Any, device: torch.device) -> Any:
    """The batch on a device, in ordinary tensors also where it was made in inference mode."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() and value.device == device else value.to(device)
    if isinstance(value, Mapping):
        return {name: to_device(item, device) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [to_device(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's mode and the random number generators come out as they went in."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted(
        {parameter.device.index or 0 for parameter in model.parameters() if parameter.device.type == "cuda"}
    )
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
