"""The tensors in what a model returns: in containers, dataclasses, and attributes of objects of any class."""

import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lrp_prune.models.batches import attributes

_DEEP = 12
"""What is within so many others is nobody's output."""
_CLOSED = (nn.Module, type, types.FunctionType, types.MethodType, types.ModuleType, str, bytes, int, float, complex)


def tensors_within(value: Any) -> list[Tensor]:
    """Every tensor in an output, in its order.

    Private attributes are looked into as well: properties may give them. Caches of generation are none of what a model says.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> len(tensors_within((torch.ones(1), SimpleNamespace(states=[torch.ones(1), None], _own={"x": torch.ones(1)}))))
        3
    """
    return list(_within(value, ()))


def _within(value: Any, around: tuple[int, ...]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if value is None or isinstance(value, _CLOSED) or id(value) in around or len(around) > _DEEP:
        return
    if isinstance(value, Mapping):
        entries = list(value.values())
    elif isinstance(value, tuple | list | set | frozenset):
        entries = list(value)
    elif type(value) in pytree.SUPPORTED_NODES:
        entries = pytree.tree_leaves(value)
    elif type(value).__module__ == "transformers.cache_utils":
        return
    else:
        entries = list(attributes(value).values())
    for entry in entries:
        yield from _within(entry, (*around, id(value)))
