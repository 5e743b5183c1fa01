"""Order-preserving integer keys of floating-point values, and what selection counts about them, chunk by chunk.

The bits of an IEEE 754 number, read as an integer, are sorted as its absolute value is once the sign bit is dropped;
with the sign applied to that integer they are sorted as the number is. So comparing, counting and selecting need no
floating-point arithmetic: nothing is rounded, denormals keep their order and -0.0 equals 0.0.

On the CPU numpy does the work (it is two to ten times faster than torch there for these operations), elsewhere torch
does; the results are the same.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lrp_prune.selection.bits import unpack

Order = Literal["absolute", "signed"]
ORDERS: tuple[str, ...] = ("absolute", "signed")
# Temporaries of this many entries stay in the second-level cache; on a GPU a kernel launch costs as much as a million
# entries. Multiples of 8, so that a chunk's bits begin at a byte.
CHUNK = 1 << 16
DEVICE_CHUNK = 1 << 24


class LazyValues:
    """A flat tensor that is computed piece by piece, when it is read.

    Args:
        entries: how many values there are.
        read: from a slice to the values in it, on one device and of one type.

    Example:
        >>> squares = LazyValues(5, lambda index: torch.arange(5.0)[index] ** 2)
        >>> squares.numel(), squares[1:4]
        (5, tensor([1., 4., 9.]))
    """

    def __init__(self, entries: int, read: Callable[[slice], Tensor]) -> None:
        self.entries, self.read = entries, read
        some = read(slice(0, 1))
        self.dtype, self.device = some.dtype, some.device

    def __getitem__(self, index: slice) -> Tensor:
        return self.read(index)

    def numel(self) -> int:
        """How many values there are."""
        return self.entries


class KeyFormat(NamedTuple):
    """Integers that stand for the values of one floating-point type under one order."""

    absolute: bool
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """Bits of a key, its sign included."""
        return 64 if self.dtype == torch.float64 else 32

    @property
    def infinity(self) -> int:
        """The key of infinity: that of a NaN is above, that of any finite value below."""
        return 0x7FF0000000000000 if self.dtype == torch.float64 else 0x7F800000

    @property
    def minimum(self) -> int:
        """A key that none lies below."""
        return 0 if self.absolute else -(1 << (self.width - 1))

    @property
    def first(self) -> int:
        """Stands for an entry that comes before all others."""
        return -(1 << (self.width - 1))

    @property
    def last(self) -> int:
        """Stands for an entry that comes after all others."""
        return (1 << (self.width - 1)) - 1

    def of(self, values: Tensor) -> Tensor:
        """Keys of values of any shape, as a new tensor of integers of that shape."""
        values = values.to(self.dtype)
        integer = torch.int64 if self.width == 64 else torch.int32
        if values.device.type != "cpu":
            raw = values.view(integer)
            magnitude = raw & self.last
            if self.absolute:
                return magnitude
            sign = raw >> (self.width - 1)
            return magnitude.bitwise_xor_(sign).sub_(sign)
        bits = values.detach().view(integer).numpy()
        keys = np.bitwise_and(bits, self.last)
        if not self.absolute:
            signs = bits >> (self.width - 1)
            keys ^= signs
            keys -= signs
        return torch.from_numpy(keys)

    def finite(self, keys: Tensor) -> bool:
        """Whether none of the keys is that of an infinity or a NaN."""
        if keys.numel() == 0:
            return True
        if keys.device.type == "cpu":
            array = keys.numpy()
            return bool(array.max() < self.infinity and (self.absolute or array.min() > -self.infinity))
        return bool(keys.max() < self.infinity and (self.absolute or keys.min() > -self.infinity))

    def chunks(self, values: Tensor | LazyValues) -> Iterator[tuple[int, Tensor]]:
        """The keys of a flat tensor by chunks: position of the first, keys ``[<= CHUNK]``."""
        size = CHUNK if values.device.type == "cpu" else DEVICE_CHUNK
        for start in range(0, values.numel(), size):
            yield start, self.of(values[start : start + size])


def replace_pruned(keys: Tensor, bits: Tensor, start: int, key: int) -> None:
    """Give a chunk's pruned entries (clear in ``bits``, from entry ``start``, a multiple of 8) one key, in place."""
    kept = unpack(bits[start // 8 : (start + keys.numel() + 7) // 8].to(keys.device), (keys.numel(),))
    if keys.device.type == "cpu":
        np.copyto(keys.numpy(), key, where=~kept.numpy())
    else:
        keys.masked_fill_(~kept, key)


def between(keys: Tensor, low: int, high: int, *, collect: bool = True) -> tuple[int, int, Tensor | None]:
    """How many keys lie below ``low``, how many in ``[low, high)``, and (if wanted) these."""
    if keys.device.type != "cpu":
        inside = (keys >= low) & (keys < high)
        found = keys[inside] if collect else None
        return int((keys < low).sum()), int(inside.sum()), found
    array = keys.numpy()
    below = array < low
    inner = array < high
    inner ^= below
    number = int(np.count_nonzero(inner))
    return int(np.count_nonzero(below)), number, torch.from_numpy(array[inner]) if collect else None


def histogram(keys: Tensor, base: int, shift: int, bins: int) -> Tensor:
    """How many keys have ``(key >> shift) - base`` equal to 0, 1, ..., ``bins - 1``, as int64 ``[bins]`` on the CPU."""
    if keys.device.type != "cpu":
        return torch.bincount((keys >> shift).long() - base, minlength=bins).cpu()
    digits = (keys.numpy() >> shift).astype(np.int64)
    digits -= base
    return torch.from_numpy(np.bincount(digits, minlength=bins))
