"""Precision of what rules compute, also of tensors that have shapes alone."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from lrp_prune.without_data import has_data

_Result = TypeVar("_Result")


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off: rules choose their precision by themselves.

    Args:
        device: where they compute; torch refuses autocast for ``"meta"``, where there is none to be turned off.
    """
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def as_run_now(function: Callable[..., _Result], device: torch.device) -> Callable[..., _Result]:
    """A function that computes the same whenever it is run: under autocast as it is now.

    Some operations compute in float32 there, and some, such as ``prelu``, take operands of two types only there.

    Args:
        function: of the model.
        device: where it computes.

    Example:
        >>> x = torch.ones(2, 2)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     product = as_run_now(torch.mm, x.device)
        >>> product(x, x).dtype
        torch.bfloat16
    """
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return function
    dtype = torch.get_autocast_dtype(device.type)

    def run(*args: Any) -> _Result:
        with torch.autocast(device.type, dtype):
            return function(*args)

    return run


def is_finite(value: Tensor) -> bool:
    """Whether all entries are finite, as far as there are any."""
    return not has_data(value) or bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())
