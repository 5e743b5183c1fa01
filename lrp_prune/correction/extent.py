"""What there is to choose from, in one process or in several that have parts of it: the k smallest of all either way."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lrp_prune.distributed.sharding import Sharding
from lrp_prune.selection.keys import LazyValues
from lrp_prune.selection.selection import smallest
from lrp_prune.selection.together import smallest_together

if TYPE_CHECKING:
    from lrp_prune.relevance import Relevance


class Extent(NamedTuple):
    """What there is to choose from: the shapes of what is here, and how tensors are divided among processes.

    Args:
        shapes: of this process's part of each tensor.
        shardings: of those tensors that are divided.
    """

    shapes: dict[str, torch.Size]
    shardings: dict[str, Sharding]

    @classmethod
    def of(cls, names: Sequence[str], first: "Relevance", second: "Relevance") -> "Extent":
        """That of two relevances, without computing values; a tensor may be in one of them only."""
        shapes, shardings = {}, {}
        for name in names:
            relevance = first if name in first else second
            shapes[name] = relevance.sums[name].shape
            sharding = relevance.sharding(name)
            if sharding is not None and sharding.axis is not None:
                shardings[name] = sharding
        return cls(shapes, shardings)

    def here(self, name: str) -> int:
        """Entries of a tensor that are in this process."""
        return self.shapes[name].numel()

    def size(self, name: str) -> int:
        """Entries of a tensor in all processes."""
        return math.prod(self.shardings[name].shape) if name in self.shardings else self.here(name)

    def counted(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Numbers of entries of all processes, from those of this one; called in all of them."""
        if not self.shardings:
            return dict(counts)
        first = next(iter(self.shardings.values()))
        together = first.all_reduced(
            torch.tensor([counts[name] for name in self.shardings if name in counts], device="cpu")
        )
        found = zip([name for name in self.shardings if name in counts], together.tolist(), strict=True)
        return {**counts, **dict(found)}

    def smallest(
        self, read: Callable[[str, slice], Tensor], names: Sequence[str], k: int, order: str
    ) -> dict[str, Tensor]:
        """Packed masks of the parts here when the ``k`` smallest of all entries of these tensors are not kept."""
        if any(name in self.shardings for name in names):
            masks = smallest_together(_Values(self, read), names, k, order, [None] * len(names))
        else:
            values = [LazyValues(self.here(name), partial(read, name)) for name in names]
            masks = smallest(values, k, order=order, names=names, dtype=torch.float32)
        return dict(zip(names, masks, strict=True))


class _Values:
    """Values by what reads them, as the selection of several processes takes them."""

    def __init__(self, extent: Extent, read: Callable[[str, slice], Tensor]) -> None:
        self._extent, self.read = extent, read

    def sharding(self, name: str) -> Sharding | None:
        return self._extent.shardings.get(name)

    def local(self, name: str) -> Tensor:
        return self.read(name, slice(0, self._extent.here(name))).view(self._extent.shapes[name])
