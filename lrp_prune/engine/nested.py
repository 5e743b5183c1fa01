"""Tensors in nested arguments and outputs."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in any nesting of mappings, lists and tuples.

    Example:
        >>> import torch
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
