"""Running a model without a trace: as it is written, in evaluation mode, with nothing logged, and all restored."""

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrp_prune.walks import modules_of


def is_compiled(model: nn.Module) -> bool:
    """Also where only a forward is, as Lightning leaves a module that was compiled before it was given to a trainer."""
    return any(
        "_orig_mod" in module._modules
        or module._compiled_call_impl is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in modules_of(model)
    )


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Runs what is compiled as it is written: compiled calls pass by hooks that were registered later."""
    if not is_compiled(model):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


_LOGGING = ("log", "log_dict")


def _log_nothing(*_: Any, **__: Any) -> None:
    """What stands in the place of ``log``."""


@contextmanager
def unlogged(model: nn.Module) -> Iterator[None]:
    """What a ``LightningModule`` logs inside, this one or one in it, goes nowhere: it would stand for what its own steps log."""
    modules = modules_of(model)
    kinds = {
        kind for kind in set(map(type, modules)) if any(base.__name__ == "LightningModule" for base in kind.__mro__)
    }
    logging = [vars(module) for module in modules if type(module) in kinds] if kinds else []
    before = [{name: own[name] for name in _LOGGING if name in own} for own in logging]
    try:
        for own in logging:
            own.update(dict.fromkeys(_LOGGING, _log_nothing))
        yield
    finally:
        for own, known in zip(logging, before, strict=True):
            for name in _LOGGING:
                own.pop(name, None)
            own.update(known)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and nothing is logged; every module's mode and the generators of random numbers come out as they
    went in.

    These are torch's, numpy's and Python's.
    """
    modules = modules_of(model)
    modes = [(module, module.training) for module in modules]
    devices = sorted(
        {
            parameter.device.index or 0
            for module in modules
            for parameter in module._parameters.values()
            if parameter is not None and parameter.device.type == "cuda"
        }
    )
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices), unlogged(model):
        if any(training for _, training in modes):
            model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                if module.training != training:
                    module.training = training
            random.setstate(of_python)
            np.random.set_state(of_numpy)


_OF_TORCH = frozenset(vars(nn.Module())) - {"_buffers"}
_LARGEST = 1024
"""Entries of a container that is looked into: caches are by layer, length or device."""


def make_kept_ordinary(model: nn.Module) -> None:
    """Let tensors that a forward kept for later while in ``torch.inference_mode`` (tables of positions, masks) be ordinary ones.

    Nothing can be differentiated through the others. They are buffers, attributes, or in containers that are; what several
    modules share they share afterwards.
    """
    # By number; what is held gives its number to nothing else.
    made: dict[int, tuple[Tensor, Tensor]] = {}
    seen: dict[int, Any] = {}
    for module in modules_of(model):
        own = vars(module)
        for name, value in own.items():
            if name not in _OF_TORCH and isinstance(value, Tensor | dict | list | tuple):
                ordinary = _ordinary(value, made, seen)
                if ordinary is not value:
                    own[name] = ordinary


def _ordinary(value: Any, made: dict[int, tuple[Tensor, Tensor]], seen: dict[int, Any]) -> Any:
    """The value with other tensors in place of those of inference mode, in place where that can be; itself without any."""
    if isinstance(value, Tensor):
        if not value.is_inference():
            return value
        return made.setdefault(id(value), (value, value.clone()))[1]
    if not isinstance(value, dict | list | tuple) or len(value) > _LARGEST or id(value) in seen:
        return value
    seen[id(value)] = value
    if isinstance(value, dict):
        for key, entry in list(value.items()):
            ordinary = _ordinary(entry, made, seen)
            if ordinary is not entry:
                value[key] = ordinary
        return value
    entries = [_ordinary(entry, made, seen) for entry in value]
    if all(one is other for one, other in zip(entries, value, strict=True)):
        return value
    if isinstance(value, list):
        value[:] = entries
        return value
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)


@contextmanager
def unchanged_state(model: nn.Module) -> Iterator[None]:
    """What a forward writes into a model comes out as it went in: buffers, also replaced ones, metrics, numbers and strings.

    Running statistics and caches are buffers; a count of calls is a number; what a ``torchmetrics.Metric`` has gathered is kept
    in attributes.
    """
    plain = [(module, type(module), _plain(module)) for module in modules_of(model)]
    kind = getattr(
        sys.modules.get("torchmetrics"), "Metric", ()
    )  # whose import takes seconds: without it there is none
    metrics = [(module, _gathered(module)) for module in modules_of(model) if isinstance(module, kind)]
    with _unchanged_buffers(model):
        try:
            yield
        finally:
            for module, before, values in plain:
                if type(module) is before:  # a lazy module has become another one
                    own = vars(module)
                    for name, value in values.items():
                        if name in own and own[name] is not value:
                            own[name] = value
            for metric, state in metrics:
                for name, (value, kept) in state.items():
                    vars(metric)[name] = _put_back(value, kept)


def _plain(module: nn.Module) -> dict[str, Any]:
    if type(module).__module__.partition(".")[0] == "torch":  # of copies among processes it is what they agreed on
        return {}
    own = vars(module)
    return {
        name: value for name, value in own.items() if isinstance(value, int | float | str) and name not in _OF_TORCH
    }


def _gathered(metric: Any) -> dict[str, tuple[Any, Any]]:
    """What a metric knows, each with a copy: updates change tensors in place and append to lists."""
    own, names = vars(metric), (*metric._defaults, "_computed", "_cache", "_forward_cache")
    found = {name: own[name] for name in names if name in own}
    return {
        name: (value, value.clone() if isinstance(value, Tensor) else copy.copy(value)) for name, value in found.items()
    }


def _put_back(value: Any, kept: Any) -> Any:
    """The same object with what it had."""
    if isinstance(value, list):
        value[:] = kept
    elif isinstance(value, Tensor) and not torch.equal(value, kept):
        if value.is_inference():
            return kept
        with torch.no_grad():
            value.copy_(kept)
    return value


@contextmanager
def _unchanged_buffers(model: nn.Module) -> Iterator[None]:
    buffers = [
        (module, name, buffer, None if buffer.is_inference() else buffer._version, buffer.clone(), set(buffer.__dict__))
        for module in modules_of(model)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, version, value, attributes in buffers:
            for mark in set(buffer.__dict__) - attributes:
                delattr(buffer, mark)
            if version is not None and buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)
            module._buffers[name] = buffer


@contextmanager
def unchanged_configuration(configuration: object) -> Iterator[None]:
    """A Hugging Face configuration comes out as it went in: a forward with labels writes down what it takes them for."""
    before = dict(vars(configuration)) if configuration is not None else {}
    try:
        yield
    finally:
        if configuration is not None and vars(configuration) != before:
            vars(configuration).clear()
            vars(configuration).update(before)
