"""Running a model without a trace: as it is written, in evaluation mode, with modes, random numbers and buffers restored."""

import random
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


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's mode and the generators of random numbers come out as they went in.

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
    with torch.random.fork_rng(devices=devices):
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


def make_kept_ordinary(model: nn.Module) -> None:
    """Let tensors that a forward kept for later while in ``torch.inference_mode`` (tables of positions, masks) be ordinary ones.

    Nothing can be differentiated through the others. They are buffers, attributes, or in a list or a dictionary that is one.
    """
    for module in modules_of(model):
        own = vars(module)
        for name, value in own.items():
            if name in _OF_TORCH:
                continue
            if type(value) is dict or (name == "_buffers" and isinstance(value, dict)):
                value.update({key: entry.clone() for key, entry in value.items() if _is_inference(entry)})
            elif type(value) is list:
                value[:] = [entry.clone() if _is_inference(entry) else entry for entry in value]
            elif _is_inference(value):
                own[name] = value.clone()


def _is_inference(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_inference()


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Running statistics, counters and caches come out as they went in, also where a forward replaces a buffer."""
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
