"""What is multiplied for a statistic, made once where uses share an activation."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


class Latest:
    """What was made of the tensor at hand, kept until another tensor is asked about.

    Queries, keys and values, and the two inputs of a gated product, multiply the same activation one after the other.
    """

    def __init__(self) -> None:
        self._source: Tensor | None = None
        self._key: tuple[Any, ...] | None = None
        self._made: dict[Hashable, Tensor] = {}

    def made(self, what: Hashable, source: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make(source)``, the second time from memory."""
        # Backward unpacks a saved activation into a new tensor each time: its memory tells which it is.
        memory = (source.untyped_storage()._cdata, source.storage_offset(), source._version)
        key = (memory, source.shape, source.stride(), source.dtype)
        if key != self._key:
            self.forget()
            self._source, self._key = source, key  # held, so that no other tensor gets its memory
        found = self._made.get(what)
        if found is None:
            found = self._made[what] = make(source)
        return found

    def forget(self) -> None:
        """Let go of the tensor."""
        self._source, self._key, self._made = None, None, {}


def energy_of(activation: Tensor) -> Tensor:
    """Sum of squares ``[features]`` over everything but the last dimension, in float32 at least."""
    rows = activation.reshape(-1, activation.shape[-1])
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).square().sum(0)
