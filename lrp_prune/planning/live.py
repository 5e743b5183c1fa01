"""How many bytes of tensors are alive at the same time."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts the bytes of tensors that are made while it lasts, and alive at the same time; also of tensors without data.

    Attributes:
        now: those that are alive.
        peak: at most.

    Example:
        >>> with Live() as live:
        ...     _ = torch.ones(2, 4) + 1
        >>> live.peak, live.now
        (64, 32)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {entry.untyped_storage()._cdata for entry in tree_leaves((args, kwargs)) if _is_strided(entry)}
        result = func(*args, **(kwargs or {}))
        for entry in tree_leaves(result):
            if _is_strided(entry) and entry.untyped_storage()._cdata not in given:
                self._count(entry.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _is_strided(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided
