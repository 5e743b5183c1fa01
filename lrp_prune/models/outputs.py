"""The logits in what a model returns, or in what the Hugging Face model inside it returned meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from lrp_prune.models.batches import fields
from lrp_prune.models.binding import Call
from lrp_prune.models.calling import call_of, called
from lrp_prune.models.padding import check_read_tokens
from lrp_prune.models.profile import Profile, profile_of
from lrp_prune.models.returned import tensors_within
from lrp_prune.models.wording import WAY_OUT, listed

_LOSSES = ("loss", "losses", "aux_loss", "z_loss")


class Inside:
    """What the Hugging Face model inside another was called with, and what it returned."""

    def __init__(self) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.outputs: list[Any] = []


@contextmanager
def noting(profile: Profile) -> Iterator[Inside]:
    """Note the calls of the Hugging Face model inside a module that is run in this context."""
    inside = Inside()
    if profile.inner is None or profile.hands_on:
        yield inside
        return

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inside.args, inside.kwargs = args, kwargs
        inside.outputs.append(output)

    handle = profile.inner.register_forward_hook(note, with_kwargs=True)
    try:
        yield inside
    finally:
        handle.remove()


class Answer(NamedTuple):
    """What a model says about a batch, and what the batch says."""

    logits: Tensor
    labels: Tensor | None


def answer_of(model: nn.Module, batch: Any) -> Answer:
    """Run the model on a batch; its logits, and the labels.

    The logits are those of its own output, else, where it returns nothing but a loss, those of the Hugging Face model inside, or
    of its output without labels.

    Raises:
        ValueError: if the batch does not fit the model, or there are no logits.
    """
    check_read_tokens(model, batch)
    call = call_of(model, batch)
    logits, output = logits_by(model, call)
    if logits is None:
        raise ValueError(without_logits(model, output))
    labels = call.labels if isinstance(call.labels, Tensor) else None
    return Answer(logits, None if labels is None else labels.to(logits.device))


def logits_for(model: nn.Module, batch: Any) -> Tensor:
    """The logits of :func:`answer_of`."""
    return answer_of(model, batch).logits


def logits_by(model: nn.Module, call: Call) -> tuple[Tensor | None, Any]:
    """The logits of a call, as :func:`logits_for` finds them, and the output that they were found in."""
    profile = profile_of(model)
    with noting(profile) as inside:
        output = called(model, call)
    found = logits_in(output)
    if found is not None or _predictions(output):
        return found, output
    if len(inside.outputs) == 1:
        return logits_in(inside.outputs[0]), inside.outputs[0]
    if call.spare is not None:  # a loss where labels are given
        without = {name: value for name, value in call.kwargs.items() if name != call.spare}
        output = called(model, call._replace(kwargs=without))
        return logits_in(output), output
    return None, output


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: see :func:`logits_in`.

    Raises:
        ValueError: if there are none.
    """
    found = logits_in(output)
    if found is None:
        raise ValueError(f"{_what(output)} holds no logits: {WAY_OUT}")
    return found


def logits_in(output: Any) -> Tensor | None:
    """The logits in a model's output: itself, its ``logits``, or its only predictions; None if there are none.

    Of a tuple the first tensor that has a dimension, since a loss, or nothing, may come before it.

    Example:
        >>> import torch
        >>> logits_in((torch.tensor(0.5), torch.zeros(1, 2))), logits_in(torch.tensor(0.5))
        (tensor([[0., 0.]]), None)
    """
    if isinstance(output, Tensor):
        return output if output.dim() else None
    named = getattr(output, "logits", None) if not isinstance(output, dict) else output.get("logits")
    if isinstance(named, Tensor):
        return named
    predictions = _predictions(output)
    if not isinstance(output, tuple | list):
        return predictions[0] if len(predictions) == 1 else None
    return predictions[0] if predictions else None


def without_logits(model: nn.Module, output: Any) -> str:
    """Why there is nothing to explain in a model's output, and what to do."""
    return f"{profile_of(model).name} returned {_what(output)}, in which no logits are found: {WAY_OUT}"


def _predictions(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output that are no losses."""
    named = None if isinstance(output, tuple | list) else fields(output)
    if named is not None:
        entries = [value for name, value in named.items() if name not in _LOSSES]
    else:
        entries = list(output) if isinstance(output, tuple | list) else [output]
    return [entry for entry in entries if isinstance(entry, Tensor) and entry.is_floating_point() and entry.dim()]


def _what(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    named = None if isinstance(output, tuple | list) else fields(output)
    if named is not None:
        return f"{type(output).__name__} with {listed(named)}"
    shapes = [f"a tensor of shape {tuple(tensor.shape)}" for tensor in tensors_within(output)]
    return f"{type(output).__name__} of {listed(shapes)}" if shapes else type(output).__name__
