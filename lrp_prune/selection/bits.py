"""Packed booleans: one bit for each entry of a mask, in the order of its flattened tensor.

Entry ``i`` is bit ``i % 8`` (the least significant first) of byte ``i // 8``; the last byte's unused bits are zero, so
that equal masks have equal bytes. On the CPU numpy does the work, elsewhere torch does; the bytes are the same.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)
_BLOCK = 1 << 16


def num_bytes(entries: int) -> int:
    """Bytes that hold so many bits."""
    return (entries + 7) // 8


def pack(mask: Tensor) -> Tensor:
    """Pack a boolean tensor of any shape into ``[ceil(entries / 8)]`` bytes on the same device.

    Example:
        >>> pack(torch.tensor([[True, False], [True, True]]))
        tensor([13], dtype=torch.uint8)
    """
    flat = mask.reshape(-1)
    if flat.device.type == "cpu":
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
    return _pack_with_torch(flat)


def _pack_with_torch(flat: Tensor) -> Tensor:
    padded = torch.zeros(num_bytes(flat.numel()) * 8, dtype=torch.uint8, device=flat.device)
    padded[: flat.numel()] = flat
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=flat.device)
    return (padded.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: Iterable[int]) -> Tensor:
    """The boolean tensor of ``shape`` that :func:`pack` made into ``bits``, on the device of ``bits``.

    Example:
        >>> unpack(torch.tensor([13], dtype=torch.uint8), (2, 2))
        tensor([[ True, False],
                [ True,  True]])
    """
    shape = tuple(shape)
    entries = math.prod(shape)
    if bits.device.type == "cpu":
        flat = np.unpackbits(bits.numpy(), count=entries, bitorder="little")
        return torch.from_numpy(flat.view(np.bool_)).view(shape)
    return _unpack_with_torch(bits, entries).view(shape)


def _unpack_with_torch(bits: Tensor, entries: int) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, None] >> places).bitwise_and_(1).view(-1)[:entries].to(torch.bool)


def invert(bits: Tensor, entries: int) -> Tensor:
    """Flip the bits of all entries; the unused ones stay zero."""
    flipped = ~bits
    if entries % 8:
        flipped[-1] &= (1 << entries % 8) - 1
    return flipped


def count(bits: Tensor) -> int:
    """How many bits are set.

    Example:
        >>> count(torch.tensor([13], dtype=torch.uint8))
        3
    """
    array = bits.cpu().numpy()
    return sum(int(_ONES[array[start : start + _BLOCK]].sum()) for start in range(0, array.size, _BLOCK))


def check(packed: Tensor, entries: int, shape: tuple[int, ...], name: str) -> None:
    """Refuse bytes that are no packed mask of so many entries.

    Args:
        packed: the bytes.
        entries: of the mask.
        shape: of the parameter that it is of.
        name: of the parameter.

    Raises:
        ValueError: if there are more or fewer bytes, or bits beyond the entries.
    """
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (num_bytes(entries),):
        raise ValueError(
            f"the mask of {name} has {tuple(packed.shape)} {packed.dtype} where shape {shape} needs "
            f"({num_bytes(entries)},) torch.uint8"
        )
    if entries % 8 and int(packed[-1]) >> entries % 8:
        raise ValueError(f"the mask of {name} has bits beyond its {entries} entries")
