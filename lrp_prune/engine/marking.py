"""Marking what a forward computes from parameters alone: which parameter's entries a tensor has, or what it was made of."""

from typing import Any

import torch
from torch import Tensor

from lrp_prune.engine.operations import channels_of
from lrp_prune.engine.origins import derive, mark, marked, note_source, of_operation, source_of


def mark_taken(func: Any, args: Any, kwargs: Any, constant: Tensor, result: Any) -> None:
    """Mark what a function without a rule made of constants: views and copies of one of them, as a rule."""
    name = getattr(func, "__name__", "")
    copied = channels_of(name, "plain") == "copied"
    several = isinstance(result, tuple | list)
    for index, entry in enumerate(result if several else (result,)):
        if not isinstance(entry, Tensor) or not entry.is_floating_point() or entry.requires_grad:
            continue
        origin = marked(constant)
        viewed = entry.untyped_storage()._cdata == constant.untyped_storage()._cdata
        if origin is None or not (viewed or copied) or _writes(name):
            mark_made(func, "plain", args, kwargs, entry)
            continue

        def again(stand_in: Tensor, index: int = index) -> Any:
            made = func(*_replaced(args, constant, stand_in), **_replaced(kwargs, constant, stand_in))
            return made[index] if several else made

        mark(entry, derive(origin, constant, entry, copied, name, again))


def mark_made(func: Any, kind: str, args: Any, kwargs: Any, result: Tensor) -> None:
    """Mark what a function computed from constants."""
    name, operands = getattr(func, "__name__", ""), [*args, *kwargs.values()]
    if name.endswith("_like") or name.startswith("new_"):
        return  # it has the shape of a parameter, and nothing else
    if any(result is operand and (kind == "dropout" or marked(operand) is None) for operand in operands):
        return  # nothing was done; or a buffer was written to, which stays what it is
    flat = [entry for value in operands for entry in (value if isinstance(value, tuple | list) else (value,))]

    def again(carrier: Tensor, stand_in: Tensor) -> Any:
        return func(*_replaced(args, carrier, stand_in), **_replaced(kwargs, carrier, stand_in))

    origin = of_operation(name, kind, flat, result, again)
    if origin is not None:
        mark(result, origin)
        return
    sources = (source_of(entry) for entry in flat if isinstance(entry, Tensor) and not entry.requires_grad)
    source = next((found for found in sources if found is not None), None)
    if source is not None and result.is_floating_point():
        note_source(result, source)


def _writes(name: str) -> bool:
    """Whether a function changes its argument in place, by its name."""
    return name.endswith("_") and not name.endswith("__")


def _replaced(values: Any, old: Tensor, new: Tensor) -> Any:
    """Arguments with one tensor in another's place."""
    if isinstance(values, dict):
        return {name: _replaced(value, old, new) for name, value in values.items()}
    if isinstance(values, tuple | list) and not isinstance(values, torch.Size):
        return type(values)(_replaced(value, old, new) for value in values)
    return new if values is old else values
