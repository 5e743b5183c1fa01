"""The guard: what matters to the wanted behaviour is no candidate for removal, however much it serves the other."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrp_prune.pruning import bits
from lrp_prune.pruning.keys import LazyValues
from lrp_prune.pruning.selection import smallest

if TYPE_CHECKING:
    from lrp_prune.relevance import Relevance

GUARD_SCOPES: tuple[str, ...] = ("global", "layer")


def entries_of(relevance: "Relevance", name: str) -> int:
    """How many values a tensor of the relevance has, without computing them."""
    return relevance._sums[name].numel()


def candidates(
    names: list[str], read: Callable[[str, slice], Tensor], sizes: dict[str, int], quantile: float, scope: str
) -> dict[str, Tensor]:
    r"""Packed masks of the entries whose absolute value is below a quantile: :math:`|R_i| < Q_q(|R|)`.

    Exactly :math:`\mathrm{round}(q n)` of :math:`n` entries are candidates; ties by position.

    Args:
        names: the tensors that are compared.
        read: values of a tensor's slice, of the measure that tells what matters.
        sizes: entries of each tensor.
        quantile: in (0, 1].
        scope: ``"global"``: one quantile of all tensors together; ``"layer"``: one of each tensor.

    Raises:
        ValueError: an argument is out of range, or a value is not finite.
    """
    if scope not in GUARD_SCOPES:
        raise ValueError(f"guard_scope must be one of {GUARD_SCOPES}, got {scope!r}")
    if isinstance(quantile, bool) or not 0 < quantile <= 1:
        raise ValueError(
            f"guard must be a quantile in (0, 1]: the share of entries that may be removed, or None, got {quantile!r}"
        )
    found: dict[str, Tensor] = {}
    for together in [names] if scope == "global" else [[name] for name in names]:
        values = [LazyValues(sizes[name], partial(read, name)) for name in together]
        count = round(quantile * sum(sizes[name] for name in together))
        spared = smallest(values, count, ranking="absolute", names=together, dtype=torch.float32)
        for name, packed in zip(together, spared, strict=True):
            found[name] = bits.invert(packed, sizes[name])
    return found


def without(
    packed: dict[str, Tensor] | None, spared: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Packed masks of candidates (None: everything is one) without the entries at flat positions."""
    found = dict(packed) if packed is not None else {}
    for name, size in sizes.items():
        if name not in spared and name in found:
            continue
        free = bits.unpack(found[name], (size,)) if name in found else torch.ones(size, dtype=torch.bool)
        if name in spared:
            free[spared[name]] = False
        found[name] = bits.pack(free)
    return found


def unpack_slice(packed: Tensor, entries: int, index: slice) -> Tensor:
    """The bits of a slice of a packed mask's entries, as booleans."""
    start, stop, step = index.indices(entries)
    if step == 1 and start % 8 == 0:
        return bits.unpack(packed[start // 8 : bits.num_bytes(stop)], (stop - start,))
    return bits.unpack(packed, (entries,))[index]
