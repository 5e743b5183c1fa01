"""A model that runs with some activations set to zero, whatever its weights are."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lrp_prune.relevance.members import Member

_FUNCTIONS = ((F, "linear", 0, 1), (F, "conv1d", 0, 1), (F, "conv2d", 0, 1), (torch, "addmm", 1, 2))
"""Where a function that layers call is, its name, and which arguments are what it reads and the weight."""


@contextmanager
def reading_zeros(model: nn.Module, members: Sequence[Member], unit: int) -> Iterator[None]:
    """What reads the unit reads zeros.

    Raises:
        RuntimeError: if a weight that reads it is used in none of the functions that are known here.
    """
    with _read(model, members, unit, lambda activation, dim, channels: activation.index_fill(dim, channels, 0.0)):
        yield


@contextmanager
def watching_reads(model: nn.Module, members: Sequence[Member], unit: int) -> Iterator[list[Tensor]]:
    """Gives what reads the unit reads of it, as it is read."""
    read: list[Tensor] = []

    def watched(activation: Tensor, dim: int, channels: Tensor) -> Tensor:
        read.append(activation.detach().index_select(dim, channels))
        return activation

    with _read(model, members, unit, watched):
        yield read


@contextmanager
def _read(
    model: nn.Module, members: Sequence[Member], unit: int, given: Callable[[Tensor, int, Tensor], Tensor]
) -> Iterator[None]:
    """What reads the unit reads something else: ``given`` makes it of an activation, its dimension of channels, and which."""
    parameters = dict(model.named_parameters())
    channels = {
        _memory(parameters[member.parameter]): (member.owners.reshape(-1) == unit).nonzero().view(-1)
        for member in members
    }
    seen: set[int] = set()

    def other(activation: Tensor, weight: Tensor) -> Tensor:
        seen.add(_memory(weight))
        return given(activation, 1 if weight.dim() > 2 else -1, channels[_memory(weight)])

    def change(weight: Tensor, function: Callable[..., Any], args: list[Any], read: int, kwargs: dict[str, Any]) -> Any:
        args[read] = other(args[read], weight)
        return function(*args, **kwargs)

    def hooked(weight: Tensor) -> Callable[..., Any]:
        return lambda module, args: (other(args[0], weight), *args[1:])

    with ExitStack() as stack:
        for member in members:
            path, _, own = member.parameter.rpartition(".")
            module, weight = model.get_submodule(path), parameters[member.parameter]
            if own == "weight" and not list(module.children()):  # a layer, whatever it calculates by
                stack.callback(module.register_forward_pre_hook(hooked(weight)).remove)
        stack.enter_context(_changed(set(channels), change))
        yield
    if seen != set(channels):
        raise RuntimeError(f"{members[0].parameter} is used in no function whose input could be set to zero")


@contextmanager
def writing_zeros(model: nn.Module, members: Sequence[Member], unit: int) -> Iterator[None]:
    """The layers that have the unit's weights put out zeros.

    A module that is given the stream as well puts out more than what the unit writes: there the shifts that it owns are zero.

    Raises:
        RuntimeError: if one of them is called neither as a module nor as a function that is known here.
    """
    parameters = dict(model.named_parameters())
    names = {_memory(parameters[member.parameter]): member.parameter.rpartition(".")[0] for member in members}
    called: set[str] = set()

    def change(weight: Tensor, function: Callable[..., Any], args: list[Any], read: int, kwargs: dict[str, Any]) -> Any:
        called.add(names[_memory(weight)])
        return torch.zeros_like(function(*args, **kwargs))

    def silenced(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            called.add(name)
            own = [parameters[each.parameter] for each in members if each.parameter.rpartition(".")[0] == name]
            given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            if len(given) > 1 and all(parameter.dim() == 1 for parameter in own):
                return _without(own, lambda: module.forward(*args, **kwargs))
            return tree_map(lambda value: torch.zeros_like(value) if isinstance(value, Tensor) else value, output)

        return hook

    with ExitStack() as stack:
        for name in set(names.values()):
            module = model.get_submodule(name)
            stack.callback(module.register_forward_hook(silenced(name), with_kwargs=True).remove)
        stack.enter_context(_changed(set(names), change))
        yield
    missing = set(names.values()) - called
    if missing:
        raise RuntimeError(f"{', '.join(missing)} is called in no way in which it could be silenced")


def _without(parameters: Sequence[Tensor], call: Callable[[], Any]) -> Any:
    """What comes of a call while some parameters are zero."""
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
        # A parameter that is handed on as it is has its values again afterwards.
        result = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, call())
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    return result


@contextmanager
def _changed(weights: set[int], change: Callable[..., Any]) -> Iterator[None]:
    """Calls of functions with some weights, or views of these, go through ``change``."""

    def changed(function: Callable[..., Any], read: int, by: int) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            weight = args[by] if len(args) > by else kwargs.get("weight")
            if not isinstance(weight, Tensor) or _memory(weight) not in weights:
                return function(*args, **kwargs)
            return change(weight, function, list(args), read, kwargs)

        return called

    with ExitStack() as stack:
        # A kernel that does all of an attention calls none of them.
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for place, name, read, by in _FUNCTIONS:
            stack.enter_context(patch.object(place, name, changed(getattr(place, name), read, by)))
        yield


def _memory(tensor: Tensor) -> int:
    """What a weight and its views have in common."""
    return tensor.untyped_storage().data_ptr()
