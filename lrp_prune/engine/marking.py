"""Marking what a forward computes from parameters alone: which parameter's entries a tensor has, or what it was made of."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.engine.operations import channels_of
from lrp_prune.engine.origins import RESHAPING, Origin, derive, mark, marked, note_source, of_operation, source_of

_NUMBERS = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, slice, type(...)})


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
        if origin is None or not (viewed or copied or name in RESHAPING) or _writes(name):
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
        return _alike(values, [_replaced(value, old, new) for value in values])
    return new if values is old else values


def _alike(values: Any, entries: list[Any]) -> Any:
    """Other entries in a list or tuple of the same kind, with names or without."""
    return type(values)(*entries) if hasattr(values, "_fields") else type(values)(entries)


def without_parameters(
    args: Any, kwargs: dict[str, Any], origins: Mapping[int, Origin], touched: set[str]
) -> tuple[Any, dict[str, Any], Tensor | None]:
    """The arguments with parameters detached (and marked), and one that stems from a parameter, if any does.

    Args:
        args: of a torch function.
        kwargs: likewise.
        origins: of the model's parameters, by their ids.
        touched: takes the names of parameters among the arguments.
    """
    detaching = _Detaching(origins, touched)
    converted = tuple(detaching.of(value) for value in args)
    return converted, {name: detaching.of(value) for name, value in kwargs.items()}, detaching.found


class _Detaching:
    """Goes through arguments; an object, as a function that calls itself would keep what it saw alive in a circle."""

    __slots__ = ("_origins", "_touched", "found")

    def __init__(self, origins: Mapping[int, Origin], touched: set[str]) -> None:
        self._origins, self._touched = origins, touched
        self.found: Tensor | None = None

    def of(self, value: Any) -> Any:
        kind = type(value)
        if kind in _NUMBERS:
            return value
        if kind is Tensor or isinstance(value, Tensor):
            # Asking whether something is a parameter takes long, and a plain tensor is none.
            if kind is not Tensor and isinstance(value, nn.Parameter):
                origin = self._origins.get(id(value))
                value = value.detach()
                if origin is not None:
                    mark(value, origin)
                    self._touched.add(origin.name)
                    self.found = value if self.found is None else self.found
            elif self.found is None and not value.requires_grad and source_of(value) is not None:
                self.found = value
            return value
        if isinstance(value, list | tuple) and value and not isinstance(value, torch.Size):
            return _alike(value, [self.of(entry) for entry in value])
        return value
