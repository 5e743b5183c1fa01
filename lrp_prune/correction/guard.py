"""The guard: what matters to the wanted behaviour is no candidate for removal, however much it serves the other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lrp_prune.distributed.sharding import Sharding
from lrp_prune.relevance import Relevance
from lrp_prune.relevance.statistics import OF_RELEVANCE
from lrp_prune.selection import bits
from lrp_prune.selection.together import smallest_of
from lrp_prune.selection.values import Values

GuardScope = Literal["global", "layer"]


@dataclass(frozen=True)
class Guard:
    """What spares the entries that the general behaviour depends on; a number stands for one with all else by default.

    Args:
        share: of the entries that may be removed at all: those whose absolute relevance for the general set is below this
            quantile.
        by: another relevance for the general set (in reverse, the undesired one) that the quantile is taken of; of a callback,
            the statistic in which it collects one, ``"squared_token"`` say. None: the one that the contrast is made of.
        scope: one quantile of all tensors (``"global"``) or one of each (``"layer"``).

    Raises:
        ValueError: for an argument that is not possible.

    Example:
        >>> Guard(0.5, scope="layer")
        Guard(share=0.5, by=None, scope='layer')
    """

    share: float = 0.7
    by: Any = None
    scope: GuardScope = "global"

    def __post_init__(self) -> None:
        _check_share(self.share, "the guard's share must be in (0, 1]")
        if self.scope not in get_args(GuardScope):
            raise ValueError(f"the guard's scope must be one of {get_args(GuardScope)}, got {self.scope!r}")
        if isinstance(self.by, str) and self.by not in OF_RELEVANCE:
            raise ValueError(f"the guard's statistic must be one of {OF_RELEVANCE}, got {self.by!r}")

    def measured_by(self, general: Relevance) -> Relevance:
        """What the quantile is taken of.

        Raises:
            ValueError: if it is not collected yet.
        """
        if self.by is not None and not isinstance(self.by, Relevance):
            raise ValueError(
                f"a guard by {self.by!r} is for a callback, which collects it: pass the relevance of the general set, "
                f"Guard(by=lrp_prune.attribute(..., statistic={self.by!r}))"
            )
        return general if self.by is None else self.by


def guard_of(guard: "float | Guard | None") -> Guard | None:
    """The guard that a number stands for, or is given; None for none.

    Raises:
        ValueError: if it is none of these.
    """
    if guard is None or isinstance(guard, Guard):
        return guard
    _check_share(guard, "guard must be None, a Guard, or in (0, 1], the share of entries that may be removed")
    return Guard(guard)


def _check_share(share: Any, message: str) -> None:
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"{message}, got {share!r}")


def candidates(values: Values, names: list[str], guard: Guard) -> dict[str, Tensor]:
    r"""Packed masks of the entries whose absolute value is below a quantile: :math:`|R_i| < Q_q(|R|)`.

    Exactly :math:`\mathrm{round}(q n)` of :math:`n` entries are candidates; ties by position.

    Args:
        values: of the measure that tells what matters.
        names: the tensors that are compared.
        guard: which quantile, and of what: of all tensors together, or of each.

    Raises:
        ValueError: a value is not finite.
    """
    found: dict[str, Tensor] = {}
    for together in [names] if guard.scope == "global" else [[name] for name in names]:
        count = round(guard.share * sum(values.sharding(name).numel for name in together))
        for name, packed in smallest_of(values, together, count, "absolute").masks().items():
            found[name] = bits.invert(packed, values.sharding(name).local_numel)
    return found


def without(
    packed: dict[str, Tensor] | None, spared: Mapping[str, Tensor], shardings: Mapping[str, Sharding]
) -> dict[str, Tensor]:
    """Packed masks of candidates (None: everything is one) without the entries at flat positions."""
    found = dict(packed) if packed is not None else {}
    for name, sharding in shardings.items():
        if name not in spared and name in found:
            continue
        shape = sharding.local_shape
        free = bits.unpack(found[name], shape) if name in found else torch.ones(shape, dtype=torch.bool, device="cpu")
        if name in spared and shape:
            _, coordinates = sharding.located(torch.unravel_index(spared[name], sharding.shape))
            free[coordinates] = False
        elif name in spared:
            free.view(-1)[spared[name]] = False
        found[name] = bits.pack(free)
    return found


def unpack_slice(packed: Tensor, entries: int, index: slice) -> Tensor:
    """The bits of a slice of a packed mask's entries, as booleans."""
    start, stop, step = index.indices(entries)
    if step == 1 and start % 8 == 0:
        return bits.unpack(packed[start // 8 : bits.num_bytes(stop)], (stop - start,))
    return bits.unpack(packed, (entries,))[index]
