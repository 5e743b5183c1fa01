"""The guard: what matters to the wanted behaviour is no candidate for removal, however much it serves the other."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lrp_prune.distributed.sharding import Sharding
from lrp_prune.selection import bits
from lrp_prune.selection.together import smallest_of
from lrp_prune.selection.values import Values

GUARD_SCOPES: tuple[str, ...] = ("global", "layer")


def candidates(values: Values, names: list[str], quantile: float, scope: str) -> dict[str, Tensor]:
    r"""Packed masks of the entries whose absolute value is below a quantile: :math:`|R_i| < Q_q(|R|)`.

    Exactly :math:`\mathrm{round}(q n)` of :math:`n` entries are candidates; ties by position.

    Args:
        values: of the measure that tells what matters.
        names: the tensors that are compared.
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
        count = round(quantile * sum(values.sharding(name).numel for name in together))
        for name, packed in smallest_of(values, together, count, "absolute").items():
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
