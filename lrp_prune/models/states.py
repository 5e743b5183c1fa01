"""Running a model without a trace: as it is written, in evaluation mode, with modes, random numbers and buffers restored."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

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
    """Evaluation mode inside; every module's mode and the random number generators come out as they went in."""
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
    with torch.random.fork_rng(devices=devices):
        if any(training for _, training in modes):
            model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                if module.training != training:
                    module.training = training


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
