"""Of what tensors are made: marks that go from what an operation gets to what it gives, whatever the operation is."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrp_prune.engine.nested import is_transformed


class Lineage(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's has no types
    """While it is entered, what is computed from marked tensors is marked as they are.

    Unlike a graph of gradients it sees comparisons, integers, and what was detached.

    Args:
        told: gets the marks of what an operation read, if there are any, and what it gave.
    """

    def __init__(self, told: Callable[[frozenset[str], Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._told = told
        self._marks: dict[int, tuple[StorageWeakRef, frozenset[str]]] = {}  # who refers to a storage keeps its address

    def begin(self, values: Any, mark: str) -> None:
        """Mark tensors, of which nothing else is remembered."""
        self._mark(values, frozenset({mark}))

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sources = self._of((args, kwargs))
        if sources:
            self._told(sources, result)
            self._mark(result, sources)
        return result

    def _of(self, values: Any) -> frozenset[str]:
        found = (
            self._marks.get(storage.cdata) for storage in map(_storage, tree_leaves(values)) if storage is not None
        )
        return frozenset().union(*(marks for _, marks in filter(None, found)))

    def _mark(self, values: Any, marks: frozenset[str]) -> None:
        for storage in map(_storage, tree_leaves(values)):
            if storage is not None:
                self._marks[storage.cdata] = (storage, marks)


def _storage(value: Any) -> StorageWeakRef | None:
    """What a tensor and its views lie in; of a sparse one, or one inside a transformation of `torch.func`, that is nothing."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or is_transformed(value):
        return None
    return StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]
