"""Runs without data: tensors may have shapes alone, on the meta device or as fake ones of a forward that computes nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def has_data(value: Tensor) -> bool:
    """Whether there are entries to be read.

    Example:
        >>> has_data(torch.ones(2)), has_data(torch.ones(2, device="meta"))
        (True, False)
    """
    return getattr(value, "fake_mode", None) is None and not value.is_meta


@contextmanager
def on_own_data() -> Iterator[None]:
    """Inside, tensors that are made have entries, also while a model is run without: what is written down about it has."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        yield


@on_own_data()
def keeps_zeros(function: Callable[[Tensor], object], like: Tensor, size: tuple[int, ...]) -> bool:
    """Whether a function is zero at zeros, by asking it; not where it needs what has no entries.

    Args:
        function: of one tensor.
        like: has the type of the zeros, and where it has entries the device.
        size: of the zeros.

    Example:
        >>> keeps_zeros(torch.tanh, torch.ones(2), (1,)), keeps_zeros(torch.exp, torch.ones(2), (1,))
        (True, False)
    """
    value = function(torch.zeros(size, dtype=like.dtype, device=like.device if has_data(like) else "cpu"))
    return isinstance(value, Tensor) and has_data(value) and not bool(value.any())
