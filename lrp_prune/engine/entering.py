"""Where a model begins and ends: rules act in its outermost call, with its float arguments as roots."""

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from lrp_prune.engine.constants import Constants
from lrp_prune.engine.endings import Endings
from lrp_prune.engine.mode import PropagationMode
from lrp_prune.engine.roots import Roots
from lrp_prune.engine.saved import Saving
from lrp_prune.engine.tracing import UnitTracer
from lrp_prune.models.returned import tensors_within

_NOT_DATA = ("mask", "labels", "label_ids", "return_loss")


def guard(
    stack: ExitStack,
    model: nn.Module,
    entries: Sequence[nn.Module],
    mode: PropagationMode,
    roots: Roots,
    endings: Endings,
    constants: Constants | None,
    tracer: UnitTracer | None,
    saving: Saving,
) -> None:
    """Let rules act in the outermost call of an entry module, with its float arguments as roots."""
    calls: list[ExitStack] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        outermost = not mode.is_acting
        call = ExitStack()
        call.enter_context(mode.acting())
        calls.append(call)
        if not outermost:
            return None
        if mode.audit is not None:
            with torch._C.DisableTorchFunction():
                mode.audit.entered((args, kwargs))
        adopt = module is model
        # The model may ask for gradients of what requires grad in the batch; that roots do is no business of its.
        within = saving.everything or (adopt and any(tensor.requires_grad for tensor in tensors_within((args, kwargs))))
        names = [name for name in inspect.signature(module.forward).parameters if name != "self"]
        named = [names[index] if index < len(names) else str(index) for index in range(len(args))]
        converted = tuple(
            arg if _is_no_data(name) else roots.inputs(arg, name, adopt) for name, arg in zip(named, args, strict=True)
        )
        given = {name: arg if _is_no_data(name) else roots.inputs(arg, name, adopt) for name, arg in kwargs.items()}
        saving.everything = within
        return converted, given

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if calls:
            calls.pop().close()
        if calls:
            return
        if tracer is not None and module is model:
            tracer.outputs(tensors_within(output))
        if output is not None:
            with torch._C.DisableTorchFunction():
                endings.called(output)
        if mode.audit is not None:
            mode.audit.forget()
        if constants is not None:
            constants.forget()

    for module in dict.fromkeys(entries):
        # First of all: hooks of the model's own compute weights (torch.nn.utils.prune).
        before = module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        after = module.register_forward_hook(leave, always_call=True)
        stack.callback(before.remove)
        stack.callback(after.remove)


def _is_no_data(name: str) -> bool:
    return any(part in name for part in _NOT_DATA)
