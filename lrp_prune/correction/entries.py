"""Single entries of parameters by flat position: where they are, what they hold, and writing them."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrp_prune.distributed.sharding import is_sharded, local_part, sharding_of

_INTEGER_OF_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Entries:
    """The patched entries of one parameter.

    Attributes:
        positions: int64 ``[entries]`` into the flattened parameter, ascending.
        originals: ``[entries]``, what the parameter held there, in its own type.
        shape: of the parameter.
        checksum: of the whole parameter before; empty where it was not known.
    """

    __slots__ = ("checksum", "originals", "positions", "shape")

    def __init__(self, positions: Tensor, originals: Tensor, shape: Sequence[int], checksum: str) -> None:
        self.positions, self.originals = positions, originals
        self.shape, self.checksum = tuple(int(size) for size in shape), checksum


class Located(NamedTuple):
    """The entries at some flat positions that this process holds, and the dense tensor that they are in.

    Attributes:
        tensor: the parameter itself, or this process's shard of a ``DTensor``; outside of autograd.
        coordinates: of the held entries, one tensor ``[held]`` for each dimension.
        held: bool ``[positions]``, which of the positions are held; None for all.
    """

    tensor: Tensor
    coordinates: tuple[Tensor, ...]
    held: Tensor | None

    def read(self) -> Tensor:
        """The held entries, ``[held]``, on the CPU."""
        return self.tensor[self.coordinates].cpu()

    def write_(self, values: Tensor) -> None:
        """Set the held entries to the values ``[positions]`` of all positions."""
        with torch.no_grad():
            self.tensor[self.coordinates] = self.own(values).to(device=self.tensor.device, dtype=self.tensor.dtype)

    def fill_(self, value: float) -> None:
        """Set the held entries to one value."""
        with torch.no_grad():
            self.tensor[self.coordinates] = value

    def own(self, values: Tensor) -> Tensor:
        """Of values ``[positions]`` those of the held ones."""
        return values if self.held is None else values[self.held]


def locate(tensor: Tensor, positions: Tensor) -> Located:
    """Find entries in a parameter, or in this process's shard of it.

    Args:
        tensor: a dense tensor of any strides, or a ``DTensor``.
        positions: int64 ``[positions]`` into the flattened whole tensor.

    Example:
        >>> located = locate(torch.arange(6.0).view(2, 3), torch.tensor([1, 5]))
        >>> located.read()
        tensor([1., 5.])
    """
    index = torch.unravel_index(positions, tuple(tensor.shape)) if tensor.dim() else (positions.new_zeros(()),)
    local, held = tensor.detach(), None
    if is_sharded(tensor):
        held, index = sharding_of(tensor).located(index)
        held, local = held.cpu(), local_part(tensor)
    if tensor.dim() == 0:
        return Located(local.view(1), (torch.zeros(len(positions), dtype=torch.int64, device=local.device),), held)
    return Located(local, tuple(coordinate.to(local.device) for coordinate in index), held)


def write_together(writes: Iterable[tuple[Located, Tensor]]) -> None:
    """Set entries of several tensors: all of them, or none if one fails.

    An enclosing ``torch.autocast`` forgets its low-precision copies of weights, which would be run in place of these.
    """
    done: list[tuple[Located, Tensor]] = []
    try:
        for located, values in writes:
            done.append((located, located.read()))
            located.write_(values)
    except BaseException:
        for located, before in reversed(done):  # they may overlap
            located.tensor[located.coordinates] = before.to(located.tensor.device)
        raise
    finally:
        torch.clear_autocast_cache()


def read(tensor: Tensor, positions: Tensor) -> Tensor:
    """What a tensor holds at flat positions, ``[positions]``, on the CPU.

    Of a ``DTensor`` all processes that have parts of it must call this, and each gets all values, bit by bit.
    """
    located = locate(tensor, positions)
    if located.held is None:
        return located.read()
    here = located.read()
    integer = _INTEGER_OF_BYTES[here.element_size()]
    # Each value is in one process; zeros elsewhere. Not every backend sums integers of two bytes.
    whole = torch.zeros(len(positions), dtype=torch.int64, device="cpu")
    whole[located.held] = here.view(integer).to(torch.int64)
    return sharding_of(tensor).all_reduced(whole).to(integer).view(here.dtype)


def same_bits(first: Tensor, second: Tensor) -> Tensor:
    """Where two tensors of one shape and type are equal bit by bit: NaN equals itself, and -0.0 is not 0.0.

    Example:
        >>> same_bits(torch.tensor([float("nan"), 0.0, 1.0]), torch.tensor([float("nan"), -0.0, 1.0]))
        tensor([ True, False,  True])
    """
    integer = _INTEGER_OF_BYTES[first.element_size()]
    return first.contiguous().view(integer) == second.contiguous().view(integer)


def scaled(originals: Tensor, strength: float) -> Tensor:
    r"""Entries under a correction of some strength: :math:`(1 - s)\, w`, rounded once to the entries' type.

    Strength 0 gives the originals bit by bit, 1 gives +0.0 whatever they are.

    Example:
        >>> scaled(torch.tensor([2.0, -4.0]), 0.25)
        tensor([ 1.5000, -3.0000])
    """
    if strength == 0:
        return originals
    if strength == 1:
        return torch.zeros_like(originals)
    return (originals.to(torch.float64) * (1 - strength)).to(originals.dtype)


def check_strength(strength: float) -> None:
    """Refuse a strength outside [0, 1]."""
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], 0 for as before and 1 for removed, got {strength!r}")


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes, in hexadecimal; the same on every device and for all strides.

    A ``DTensor`` is brought together for it, so that all processes that have parts of it must call this.
    """
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = sharding_of(tensor).gathered(local_part(tensor)).cpu().contiguous().view(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
