"""Tensors in nested arguments and outputs, and those that a transformation of `torch.func` has wrapped."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in any nesting of mappings, lists and tuples.

    Example:
        >>> len(list(tensors_in({"hidden": [torch.ones(1), None], "mask": (torch.ones(1),)})))
        2
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from tensors_in(entry)


def is_transformed(value: Any) -> bool:
    """Whether a tensor stands for others, inside a transformation of `torch.func` such as ``vmap``.

    Example:
        >>> seen = []
        >>> ones = torch.func.vmap(lambda row: (seen.append(is_transformed(row)), row)[1])(torch.ones(2, 3))
        >>> seen, is_transformed(ones)
        ([True], False)
    """
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)
