"""What selection compares: values of tensors by name, of each tensor the part that is in this process, read in pieces."""

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from lrp_prune.distributed.sharding import Sharding


class Values(Protocol):
    """Values of tensors by name; a :class:`~lrp_prune.Relevance` is that."""

    def sharding(self, name: str) -> Sharding:
        """How a tensor is divided among processes, which may be not at all."""

    def local(self, name: str) -> Tensor:
        """The values of the part that is here."""

    def read(self, name: str, index: slice) -> Tensor:
        """Those of a slice of what is here, flattened."""


class Computed:
    """Values by what computes them.

    Args:
        shardings: how each tensor is divided.
        read: from a name and a slice to the values there, of the flattened part that is here.

    Example:
        >>> import torch
        >>> table = {"weight": torch.arange(6.0).view(2, 3)}
        >>> squares = Computed({"weight": Sharding((2, 3))}, lambda name, index: table[name].view(-1)[index] ** 2)
        >>> squares.local("weight")
        tensor([[ 0.,  1.,  4.],
                [ 9., 16., 25.]])
    """

    def __init__(self, shardings: Mapping[str, Sharding], read: Callable[[str, slice], Tensor]) -> None:
        self.shardings, self.read = shardings, read

    def sharding(self, name: str) -> Sharding:
        """How a tensor is divided among processes."""
        return self.shardings[name]

    def local(self, name: str) -> Tensor:
        """The values of the part that is here."""
        sharding = self.shardings[name]
        return self.read(name, slice(0, sharding.local_numel)).view(sharding.local_shape)
