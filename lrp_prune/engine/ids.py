"""Ids: whole numbers that enter a model, and by which rows of a table are looked up, also where an index does that.

A module of embeddings says what it does. ``table[ids]`` does the same, and is told from other picking of entries (of experts, of
tables of relative positions) by where the ids come from.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lrp_prune.engine.call import Call
from lrp_prune.engine.operations import OPERATIONS
from lrp_prune.engine.origins import marked
from lrp_prune.without_data import has_data

LOOKUPS = frozenset({"__getitem__", "index_select"})
"""Functions that look rows of their first argument up."""


class Ids:
    """Knows which tensors are ids: those that the model was called with, and what is made of them without becoming floats."""

    def __init__(self) -> None:
        # Not on the tensors, which are the caller's; and none is kept alive.
        self._known = WeakTensorKeyDictionary()

    def enter(self, value: Tensor) -> None:
        """The model is called with a tensor."""
        if _is_integral(value):
            self._known[value] = True

    def after(self, values: Iterable[Tensor], result: Any) -> None:
        """A function has made something of tensors."""
        if isinstance(result, Tensor) and _is_integral(result) and any(value in self._known for value in values):
            self._known[result] = True

    def lookup(self, call: Call) -> Call | None:
        """The lookup of rows of a parameter by ids that an index is; None for other calls."""
        if call.function.__name__ not in LOOKUPS:
            return None
        table, index = call.argument(0, "input"), call.argument(1, "dim")
        if call.function.__name__ == "index_select":
            index = call.argument(2, "index") if index in (0, -2) else None
        elif isinstance(index, tuple) and index and all(_is_whole(entry) for entry in index[1:]):
            index = index[0]
        if not isinstance(index, Tensor) or not isinstance(table, Tensor) or index not in self._known:
            return None
        if index.dtype == torch.uint8:  # which torch reads as a mask
            return None
        origin = marked(table)
        if table.requires_grad or table.dim() != 2 or origin is None or origin.layout is None:
            return None
        ids = (
            index.remainder(len(table)) if has_data(index) and bool((index < 0).any()) else index
        )  # counted from the end
        return call._replace(
            operation=OPERATIONS[torch.embedding], args=(table, ids), kwargs={}, function=torch.Tensor.__getitem__
        )


def _is_integral(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _is_whole(index: Any) -> bool:
    return index is Ellipsis or (isinstance(index, slice) and index == slice(None))
