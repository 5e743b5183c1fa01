"""From gates to a binary circuit, and from rankings to gates."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lrp_prune.circuits.circuit import Circuit
from lrp_prune.circuits.ranking import Ranking
from lrp_prune.circuits.sites import PARENTS, Site

WARMEST: tuple[float, float] = (-4.0, 3.0)
"""The range of locations that a warm start gives."""


def finalized(circuit: Circuit, ablation: str) -> Circuit:
    """The same function with fewer open gates.

    Units in a closed head or block have no effect and are closed. A head all of whose channels are closed is closed. A
    block all of whose units are closed reads replaced activations only, so closing it is the same where its replacement is
    computed from theirs (counterfactual, mean), and under zero ablation only where its layer has no bias.

    Args:
        circuit: of units.
        ablation: what ablated units are replaced by.
    """
    kept = {name: mask.clone() for name, mask in circuit.closed().kept.items()}
    by_place = {(site.kind, site.module): site for site in circuit.sites}
    for site in circuit.sites:
        if site.kind == "attention_neuron" and ("head", site.module) in by_place:
            head = by_place["head", site.module]
            kept[head.name] &= kept[site.name].reshape(head.units, -1).any(1)
    for site in circuit.sites:
        if not site.at_output or (ablation == "zero" and len(site.members) > 1):
            continue
        inner = [kind for kind, parents in PARENTS.items() if site.kind in parents and (kind, site.module) in by_place]
        if any(not bool(kept[by_place[kind, site.module].name].any()) for kind in inner):
            kept[site.name] &= False
    closed = Circuit(kept, circuit.sites, circuit.granularity, circuit.model, circuit.description)
    return closed.closed()


def most_open(
    sites: Sequence[Site], locations: Mapping[str, Tensor], sizes: Mapping[str, int | float]
) -> dict[str, Tensor]:
    """The units of some kinds with the largest locations, exactly so many.

    Raises:
        ValueError: for a kind that there is not.
    """
    kept: dict[str, Tensor] = {}
    for kind, size in sizes.items():
        of_kind = [site for site in sites if site.kind == kind]
        if not of_kind:
            raise ValueError(f"there are no gates of {kind!r}")
        ranking = Ranking({site.name: locations[site.name] for site in of_kind}, of_kind, kind, "signed")
        kept |= ranking.at(size).kept
    return kept


def warm_started(
    sites: Sequence[Site], rankings: Sequence[Ranking], initial: float, shares: Mapping[str, float], slope: float
) -> dict[str, Tensor]:
    r"""Locations that fall with the logarithm of a unit's rank within its kind, and are 0 at the share :math:`s` of units.

    The unit of rank :math:`r = 1 \ldots n` begins at :math:`k \ln(s n / r)`, between -4 and 3: it can be moved from there to the
    other side within a training. Kinds that no ranking covers begin at ``initial``.

    Args:
        sites: the units.
        rankings: of the same units.
        initial: for kinds without a ranking.
        shares: kind -> :math:`s`.
        slope: :math:`k`.

    Raises:
        ValueError: if a ranking is of other units, or a value cannot be.
    """
    if not math.isfinite(initial):
        raise ValueError(f"initial must be a number, got {initial}")
    for kind, share in shares.items():
        if not 0 < share <= 1:
            raise ValueError(f"open_share must be in (0, 1], got {share} for {kind}")
    start = {site.name: torch.full((site.units,), float(initial), device="cpu") for site in sites}
    units = {site.name: site.units for site in sites}
    for ranking in rankings:
        unknown = [name for name, scores in ranking.scores.items() if units.get(name) != scores.numel()]
        if unknown:
            raise ValueError(f"warm_start ranks {unknown[0]!r}, which has no gates: rank the same granularities")
        by_kind: dict[str, list[tuple[str, int]]] = {}
        for node in ranking.nodes():
            by_kind.setdefault(node.group.partition(":")[0], []).append((node.group, node.unit))
        for kind, nodes in by_kind.items():
            for rank, (name, unit) in enumerate(nodes, 1):
                location = slope * math.log(shares[kind] * len(nodes) / rank)
                start[name][unit] = min(max(location, WARMEST[0]), WARMEST[1])
    return start
