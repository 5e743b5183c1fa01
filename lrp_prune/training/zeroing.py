"""Entries of tensors set to zero where a mask has 0, and nothing else touched."""

import math
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from lrp_prune.distributed.sharding import local_part, sharding_of

_INTEGER_OF_BYTES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_SAMPLE = 1024  # entries


def zero_pruned_(tensor: Tensor, kept: Tensor) -> None:
    """Set the entries of a tensor to zero, in place and outside of autograd, where ``kept`` is 0.

    Args:
        tensor: any dense tensor; of a ``DTensor`` the part in this process.
        kept: int8 of the same shape, -1 (all bits set) where the entry is kept and 0 where it is pruned.

    Example:
        >>> tensor = torch.tensor([1.5, float("nan"), -2.0])
        >>> zero_pruned_(tensor, torch.tensor([-1, 0, -1], dtype=torch.int8))
        >>> tensor
        tensor([ 1.5000,  0.0000, -2.0000])
    """
    tensor = local_part(tensor)
    integer = _INTEGER_OF_BYTES.get(tensor.element_size())
    if integer is None:
        tensor.masked_fill_(kept == 0, 0)
        return
    bits = tensor.view(integer)
    same_layout = bits.stride() == kept.stride() and is_dense(bits)
    if bits.device.type == "cpu" and same_layout:
        # numpy widens the mask in a buffer of a few kilobytes; torch would allocate it four bytes wide.
        entries = flat(bits).numpy()
        np.bitwise_and(entries, flat(kept).numpy(), out=entries)
    else:
        bits.bitwise_and_(kept)


def as_bits(mask: Tensor, parameter: Tensor) -> Tensor:
    """0 where pruned and -1 where kept, laid out in memory as the parameter is."""
    kept = torch.empty_like(parameter, dtype=torch.int8, requires_grad=False)
    kept.copy_(mask)
    return kept.neg_()


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's entries in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def is_dense(tensor: Tensor) -> bool:
    """Whether its entries fill a piece of memory, in any order of dimensions."""
    return tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def some_pruned(kept: Tensor) -> Tensor:
    """Positions in memory of some pruned entries, from everywhere; of all where they are few."""
    entries = flat(kept)
    # Looking at part of the entries finds enough, unless very few are pruned. An odd distance meets all columns.
    distance = entries.numel() // (16 * _SAMPLE) | 1
    found = (entries[::distance] == 0).nonzero()[:, 0].mul_(distance)
    if found.numel() < _SAMPLE and distance > 1:
        found = (entries == 0).nonzero()[:, 0]
    return found[:: max(math.ceil(found.numel() / _SAMPLE), 1)].clone().cpu()


def without_pruned(sparse: Tensor, kept: Tensor) -> Tensor:
    """A sparse tensor with zeros where ``kept`` is 0."""
    sparse = sparse.coalesce()
    values, indices = sparse.values(), sparse.indices()
    zero_pruned_(values, kept[tuple(indices)])
    return torch.sparse_coo_tensor(indices, values, sparse.shape, is_coalesced=True, check_invariants=False)


def any_of(tensors: Collection[Tensor]) -> bool:
    """Whether one of many small tensors has an entry that is not zero, which takes less time than to ask each of them."""
    return bool(tensors) and bool(torch.cat(list(tensors)).any())


def part_of(mask: Tensor, parameter: Tensor, name: str) -> Tensor:
    """The mask of what this process has of a parameter.

    Raises:
        ValueError: if the mask is divided among processes, and the parameter is not, or in another way.
    """
    of_mask, of_parameter = sharding_of(mask, name), sharding_of(parameter, name)
    if of_mask.mesh is not None and of_mask != of_parameter:
        raise ValueError(
            f"the mask of {name} is divided among processes, and its parameter is not, or in another way: use "
            "masks.gathered()"
        )
    return of_parameter.part(mask) if of_mask.mesh is None else local_part(mask)
