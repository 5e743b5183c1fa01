"""Selection by processes that each hold a part of the relevance: the same masks as in one process that holds all of it.

Where all entries of a tensor or of a model are compared, the processes exchange histograms only (see
:func:`~lrp_prune.selection.selection.smallest`). Rows, columns and N:M groups are whole in one process if the tensor is
divided along another dimension; where it is not, its values are moved so that they are, and the mask is moved back.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrp_prune.distributed.sharding import Sharding, agree
from lrp_prune.selection import bits
from lrp_prune.selection.keys import LazyValues
from lrp_prune.selection.scopes import Structure, input_dim, row_dims
from lrp_prune.selection.selection import smallest
from lrp_prune.selection.values import Values

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def smallest_of(
    values: Values, names: Sequence[str], k: int, order: str, kept: Mapping[str, Tensor] | None = None
) -> "ChosenTogether":
    """The ``k`` smallest of all entries of all tensors: how many of each, and masks, which are made when they are asked for.

    Equal values are chosen by position: the order of names, then that of the flattened whole tensors.

    Args:
        values: of the tensors.
        names: which of them are compared, together.
        k: how many entries are chosen, in all processes.
        order: ``"absolute"`` or ``"signed"``.
        kept: packed, of tensors of which something is chosen already.

    Raises:
        ValueError: if tensors are divided among different processes, and what :func:`smallest` raises.
    """
    return ChosenTogether(values, names, k, order, kept)


class ChosenTogether:
    """What processes choose of tensors; see :func:`smallest_of`."""

    def __init__(
        self, values: Values, names: Sequence[str], k: int, order: str, kept: Mapping[str, Tensor] | None
    ) -> None:
        first, self._parts = _parts_of(values, names, kept)
        self._names = list(names)
        self._chosen = smallest(
            [part.values for part in self._parts],
            k,
            order=order,
            kept=[part.kept for part in self._parts],
            names=names,
            dtype=torch.float32,
            reduce=first.all_reduced,
            preceding=partial(_preceding, first),
        )
        self.pruned = dict(zip(self._names, first.all_reduced(self._chosen.counts).tolist(), strict=True))
        """How many entries of each whole tensor are chosen, or were before."""

    def masks(self) -> dict[str, Tensor]:
        """The packed masks of what is here."""
        each = zip(self._names, self._parts, self._chosen.masks(), strict=True)
        return {name: part.mask(mask) for name, part, mask in each}


def _parts_of(
    values: Values, names: Sequence[str], kept: Mapping[str, Tensor] | None
) -> "tuple[Sharding, list[_Part]]":
    """How tensors that are compared are divided, and what of each is here."""
    shardings = {name: values.sharding(name) for name in names}
    divided = {name: sharding for name, sharding in shardings.items() if sharding.is_divided}
    first = next(iter(divided.values()), Sharding(()))
    for name, sharding in divided.items():
        if (sharding.mesh, sharding.axis) != (first.mesh, first.axis):
            raise ValueError(
                f"{name} is divided among other processes than {next(iter(divided))}: they cannot be compared with each "
                "other, use scope='layer'"
            )
    return first, [_Part(values, name, (kept or {}).get(name), first) for name in names]


def _preceding(sharding: Sharding, ties: Tensor) -> Tensor:
    """How many ties lie before this process's part of each tensor: in earlier tensors, and in earlier parts of this one."""
    table = torch.zeros(sharding.parts, len(ties), dtype=torch.int64, device="cpu")
    table[sharding.rank] = ties
    table = sharding.all_reduced(table)
    totals = table.sum(0)
    return totals.cumsum(0) - totals + table[: sharding.rank].sum(0)


class _Part:
    """One tensor's part as it is compared: neighbouring rows, so that parts follow each other as the entries do.

    A tensor that every process holds is compared by the first of them, which tells the others.

    Args:
        values: of the tensors.
        name: of this one.
        kept: packed, what of it is not chosen yet; None: all.
        like: how tensors are divided that are compared with it.
    """

    def __init__(self, values: Values, name: str, kept: Tensor | None, like: Sharding) -> None:
        self._sharding, self._like, self.kept = values.sharding(name), like, kept
        self.values: Tensor | LazyValues
        if self._sharding.is_divided and self._sharding.dim != 0:
            rows = self._sharding.divided_along(0)
            self.values = self._sharding.moved(values.local(name), rows)
            if kept is not None:
                self.kept = bits.pack(self._sharding.moved(_unpacked(kept, self._sharding), rows)).cpu()
        elif self._sharding.is_divided or like.rank == 0:
            self.values = LazyValues(self._sharding.local_numel, partial(values.read, name))
        else:
            self.values, self.kept = torch.empty(0, device="cpu"), None if kept is None else kept[:0]

    def mask(self, chosen: Tensor) -> Tensor:
        """The packed mask of what is here, from that of what was compared here."""
        if not self._sharding.is_divided:
            size = bits.num_bytes(self._sharding.local_numel)
            told = chosen if self._like.rank == 0 else torch.zeros(size, dtype=torch.uint8, device="cpu")
            return self._like.all_reduced(told, "MAX")
        if self._sharding.dim == 0:
            return chosen
        rows = self._sharding.divided_along(0)
        return bits.pack(rows.moved(_unpacked(chosen, rows), self._sharding)).cpu()


def rows_together(
    values: Values,
    name: str,
    scope: str | Structure,
    layout: str,
    kept: Tensor | None,
    choose: Callable[[Tensor, Tensor | None], Tensor],
    failures: list[ValueError],
) -> Tensor:
    """The packed mask of this process's part, selected row by row (or column, or group).

    Args:
        values: of the tensors.
        name: of this one.
        scope: what is compared.
        layout: which of its dimensions are which.
        kept: packed, what is not pruned yet.
        choose: from values and their packed mask to the packed mask of what is kept.
        failures: gets what went wrong here; to be made known by :func:`raise_together`.
    """
    sharding, here = values.sharding(name), values.local(name)
    whole = range(len(sharding.shape)) if isinstance(scope, Structure) else row_dims(layout, scope)
    allowed = [dim for dim in whole if not (isinstance(scope, Structure) and dim == input_dim(layout))]
    if sharding.dim is None or sharding.dim in allowed:
        return _chosen(here, kept, choose, failures)
    old = None if kept is None else _unpacked(kept, sharding)
    if not allowed:  # a vector
        packed = None if old is None else bits.pack(sharding.gathered(old))
        everywhere = _chosen(sharding.gathered(here), packed, choose, failures)
        return bits.pack(sharding.part(bits.unpack(everywhere, sharding.shape)).contiguous())
    there = sharding.divided_along(allowed[0])
    packed = None if old is None else bits.pack(sharding.moved(old, there)).cpu()
    chosen = _chosen(sharding.moved(here, there), packed, choose, failures)
    return bits.pack(there.moved(_unpacked(chosen, there), sharding)).cpu()


def raise_together(failures: Sequence[ValueError], mesh: "DeviceMesh | None") -> None:
    """Raise in all processes if one of them has a failure."""
    agree(failures[0] if failures else None, mesh, "selecting")


def _chosen(
    values: Tensor, kept: Tensor | None, choose: Callable[[Tensor, Tensor | None], Tensor], failures: list[ValueError]
) -> Tensor:
    try:
        return choose(values, kept)
    except ValueError as error:
        failures.append(error)
        return bits.pack(torch.ones(values.shape, dtype=torch.bool, device="cpu"))


def _unpacked(packed: Tensor, sharding: Sharding) -> Tensor:
    return bits.unpack(packed, sharding.local_shape)
