"""Selection by processes that each hold a part of the relevance: the same masks as in one process that holds all of it.

Where all entries of a tensor or of a model are compared, the processes exchange histograms only (see
:func:`~lrp_prune.selection.selection.smallest`). Rows, columns and N:M groups are whole in one process if the tensor is
divided along another dimension; where it is not, its values are moved so that they are, and the mask is moved back.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lrp_prune.distributed.sharding import Sharding, agree
from lrp_prune.selection import bits
from lrp_prune.selection.keys import LazyValues
from lrp_prune.selection.scopes import Structure, input_dim, row_dims
from lrp_prune.selection.selection import smallest

if TYPE_CHECKING:
    from lrp_prune.relevance import Relevance


class Divided(Protocol):
    """Values of tensors that are divided among processes, as a :class:`~lrp_prune.Relevance` has them."""

    def sharding(self, name: str) -> Sharding | None:
        """How a tensor is divided; None if all of it is here."""

    def local(self, name: str) -> Tensor:
        """The values that are here."""

    def read(self, name: str, index: slice) -> Tensor:
        """Those of a slice of what is here, flattened."""


def smallest_together(
    relevance: Divided, names: Sequence[str], k: int, order: str, kept: Sequence[Tensor | None]
) -> list[Tensor]:
    """The packed masks of this process's parts when the ``k`` smallest of all entries of all tensors are not kept.

    Equal values are chosen by position: the order of names, then that of the flattened whole tensors.

    Raises:
        ValueError: if tensors are divided among different processes, and what :func:`smallest` raises.
    """
    shardings = {name: relevance.sharding(name) for name in names}
    found = {
        name: sharding for name, sharding in shardings.items() if sharding is not None and sharding.axis is not None
    }
    first = next(iter(found.values()))
    for name, sharding in found.items():
        if (sharding.mesh, sharding.axis) != (first.mesh, first.axis):
            raise ValueError(
                f"{name} is divided among other processes than {next(iter(found))}: they cannot be compared with each "
                "other, use scope='layer'"
            )
    parts = [_Part(relevance, name, found.get(name), old, first) for name, old in zip(names, kept, strict=True)]
    masks = smallest(
        [part.values for part in parts],
        k,
        order=order,
        kept=[part.kept for part in parts],
        names=names,
        dtype=torch.float32,
        reduce=first.all_reduced,
        preceding=partial(_preceding, first),
    )
    return [part.mask(mask) for part, mask in zip(parts, masks, strict=True)]


def pruned_together(
    shapes: Mapping[str, tuple[int, ...]], shardings: Mapping[str, Sharding], masks: Mapping[str, Tensor]
) -> dict[str, int]:
    """How many entries of whole tensors are pruned by packed masks, each of the part that is here.

    Args:
        shapes: of the whole tensors.
        shardings: of those that are divided, all among the same processes.
        masks: packed.
    """
    here = {name: shardings[name].local_shape if name in shardings else shapes[name] for name in masks}
    pruned = {name: math.prod(here[name]) - bits.count(mask) for name, mask in masks.items()}
    divided = [name for name in masks if name in shardings]
    if divided:
        counts = torch.tensor([pruned[name] for name in divided], dtype=torch.int64, device="cpu")
        pruned.update(zip(divided, shardings[divided[0]].all_reduced(counts).tolist(), strict=True))
    return pruned


def _preceding(sharding: Sharding, ties: Tensor) -> Tensor:
    """How many ties lie before this process's part of each tensor: in earlier tensors, and in earlier parts of this one."""
    assert sharding.axis is not None
    here = sharding.mesh.get_local_rank(sharding.axis)
    table = torch.zeros(sharding.mesh.size(sharding.axis), len(ties), dtype=torch.int64, device="cpu")
    table[here] = ties
    table = sharding.all_reduced(table)
    totals = table.sum(0)
    return totals.cumsum(0) - totals + table[:here].sum(0)


class _Part:
    """One tensor's part as it is compared: neighbouring rows, so that parts follow each other as the entries do.

    A tensor that every process holds is compared by the first of them, which tells the others.
    """

    def __init__(
        self, relevance: Divided, name: str, sharding: Sharding | None, kept: Tensor | None, like: Sharding
    ) -> None:
        self._sharding, self._like = sharding, like
        self._leads = like.mesh.get_local_rank(like.axis) == 0
        self._entries = relevance.local(name).numel() if sharding is None else 0
        self.values: Tensor | LazyValues
        self.kept = kept
        if sharding is None:
            self.values = relevance.local(name) if self._leads else torch.empty(0, device="cpu")
            self.kept = kept if self._leads or kept is None else kept[:0]
        elif sharding.dim == 0:
            self.values = LazyValues(_entries(sharding), partial(relevance.read, name))
        else:
            rows = sharding.divided_along(0)
            self.values = sharding.moved(relevance.local(name), rows)
            if kept is not None:
                self.kept = bits.pack(sharding.moved(_unpacked(kept, sharding), rows)).cpu()

    def mask(self, chosen: Tensor) -> Tensor:
        """The packed mask of what is here, from that of what was compared here."""
        if self._sharding is None:
            told = (
                chosen if self._leads else torch.zeros(bits.num_bytes(self._entries), dtype=torch.uint8, device="cpu")
            )
            return self._like.all_reduced(told, "MAX")
        if self._sharding.dim == 0:
            return chosen
        rows = self._sharding.divided_along(0)
        return bits.pack(rows.moved(_unpacked(chosen, rows), self._sharding)).cpu()


def rows_together(
    relevance: "Relevance",
    name: str,
    scope: str | Structure,
    layout: str,
    kept: Tensor | None,
    choose: Callable[[Tensor, Tensor | None], Tensor],
    failures: list[ValueError],
) -> Tensor:
    """The packed mask of this process's part, selected row by row (or column, or group).

    Args:
        relevance: the values.
        name: of the tensor.
        scope: what is compared.
        layout: which of its dimensions are which.
        kept: packed, what is not pruned yet.
        choose: from values and their packed mask to the packed mask of what is kept.
        failures: gets what went wrong here; to be made known by :func:`raise_together`.
    """
    sharding = relevance.sharding(name)
    values = relevance.local(name)
    if sharding is None:
        return _chosen(values, kept, choose, failures)
    whole = range(len(sharding.shape)) if isinstance(scope, Structure) else row_dims(layout, scope)
    allowed = [dim for dim in whole if not (isinstance(scope, Structure) and dim == input_dim(layout))]
    if sharding.dim is None or sharding.dim in allowed:
        return _chosen(values, kept, choose, failures)
    old = None if kept is None else _unpacked(kept, sharding)
    if not allowed:  # a vector
        packed = None if old is None else bits.pack(sharding.gathered(old))
        everywhere = _chosen(sharding.gathered(values), packed, choose, failures)
        return bits.pack(sharding.part(bits.unpack(everywhere, sharding.shape)).contiguous())
    there = sharding.divided_along(allowed[0])
    packed = None if old is None else bits.pack(sharding.moved(old, there)).cpu()
    chosen = _chosen(sharding.moved(values, there), packed, choose, failures)
    return bits.pack(there.moved(_unpacked(chosen, there), sharding)).cpu()


def raise_together(failures: Sequence[ValueError], sharding: Sharding) -> None:
    """Raise in all processes if one of them has a failure."""
    agree(failures[0] if failures else None, sharding.mesh, "selecting")


def _chosen(
    values: Tensor, kept: Tensor | None, choose: Callable[[Tensor, Tensor | None], Tensor], failures: list[ValueError]
) -> Tensor:
    try:
        return choose(values, kept)
    except ValueError as error:
        failures.append(error)
        return bits.pack(torch.ones(values.shape, dtype=torch.bool, device="cpu"))


def _entries(sharding: Sharding) -> int:
    return torch.Size(sharding.local_shape).numel()


def _unpacked(packed: Tensor, sharding: Sharding) -> Tensor:
    return bits.unpack(packed, sharding.local_shape)
