"""Several sets of wanted behaviour in one: none is outweighed by another, and what matters to any of them is spared."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lrp_prune.correction.contrast import has_any
from lrp_prune.correction.guard import Guard
from lrp_prune.relevance import Relevance
from lrp_prune.relevance.merging import check_rules, check_shapes

COMBINATIONS: tuple[str, ...] = ("mean", "largest")


def together(
    sets: Mapping[str, Relevance], combination: str = "mean", weights: Mapping[str, float] | None = None
) -> Relevance:
    r"""One relevance of several named sets, each divided by its total absolute relevance first.

    ``"mean"``: :math:`\sum_i w_i R_i / s_i \big/ \sum_i w_i`, for a contrast; ``"largest"``:
    :math:`\max_i w_i |R_i| / s_i`, for a guard: what matters to one set is spared whatever the others say, where a mean would
    hide it. Sets differ in samples, tokens and kinds of text; divided by :math:`s_i = \sum |R_i|` they count alike. A tensor that
    a set does not reach is zero for it.

    Args:
        sets: relevance by name, collected alike; at least one.
        combination: see above.
        weights: of the sets, 1 where nothing is said: more for what is to be protected most.

    Raises:
        ValueError: if there is no set, one has nothing but zeros, they were collected differently, or a weight is not positive.

    Example:
        >>> text = Relevance({"weight": torch.tensor([6.0, 2.0, 0.0])}, statistic="signed")
        >>> copying = Relevance({"weight": torch.tensor([0.0, 1.0, -1.0])}, statistic="signed")
        >>> together({"text": text, "copying": copying})["weight"]
        tensor([ 0.3750,  0.3750, -0.2500])
        >>> together({"text": text, "copying": copying}, "largest")["weight"]
        tensor([0.7500, 0.5000, 0.5000])
    """
    if combination not in COMBINATIONS:
        raise ValueError(f"combination must be one of {COMBINATIONS}, got {combination!r}")
    factors = _weights(sets, weights or {})
    if combination == "mean":
        factors = {name: factor / sum(factors.values()) for name, factor in factors.items()}
    scaled = {name: relevance.normalized("total") for name, relevance in sets.items()}
    first = next(iter(scaled.values()))
    values: dict[str, Tensor] = {}
    for tensor in dict.fromkeys(tensor for relevance in scaled.values() for tensor in relevance):
        for name, relevance in scaled.items():
            if tensor in relevance:
                part = relevance.local(tensor) * factors[name]
                mine = values.get(tensor)
                part = part.abs() if combination == "largest" else part
                values[tensor] = part if mine is None else _combined(mine, part.to(mine.device), combination)
    return first._replace(
        values,
        num_samples=sum(relevance.num_samples for relevance in sets.values()),
        parameter_shapes={name: shape for each in sets.values() for name, shape in each.parameter_shapes.items()},
        shardings={name: sharding for each in sets.values() for name, sharding in each.shardings.items()},
        members={name: members for each in sets.values() for name, members in each.members.items()},
        unscored={name: reason for name, reason in first.unscored.items() if name not in values},
        target=f"{combination} of {', '.join(sets)}",
        derived=True,
        scales={},
        inputs={},
        mean_weights={},
    )


General = Relevance | Mapping[str, Relevance]


def united(general: General, guard: Guard | None, reverse: bool = False) -> tuple[Relevance, Guard | None]:
    """What a contrast is made of and its guard, where what either is measured by may be several named sets.

    Several sets are guarded by the largest over them if nothing else is said; in reverse it is the undesired one that is guarded.
    """
    if guard is not None and isinstance(guard.by, Mapping) and not isinstance(guard.by, Relevance):
        guard = replace(guard, by=together(guard.by, "largest"))
    if isinstance(general, Relevance):
        return general, guard
    if guard is not None and guard.by is None and not reverse:
        guard = replace(guard, by=together(general, "largest"))
    return together(general), guard


def _combined(mine: Tensor, other: Tensor, combination: str) -> Tensor:
    return torch.maximum(mine, other) if combination == "largest" else mine + other


def _weights(sets: Mapping[str, Relevance], weights: Mapping[str, float]) -> dict[str, float]:
    """That of each set; of checked sets."""
    if not sets:
        raise ValueError("several sets are at least one: none is named")
    for name, relevance in sets.items():
        if not isinstance(relevance, Relevance):
            raise ValueError(f"set {name!r} must be a Relevance, got {type(relevance).__name__}")
    for problem in _differences(sets):
        raise ValueError(problem)
    for name, weight in weights.items():
        if name not in sets:
            raise ValueError(f"weights has {name!r}, which is none of {', '.join(sets)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ValueError(f"the weight of {name!r} must be a positive number, got {weight!r}")
    return {name: float(weights.get(name, 1.0)) for name in sets}


def _differences(sets: Mapping[str, Relevance]) -> Iterator[str]:
    (first_name, first), *others = sets.items()
    for name, relevance in others:
        for what in ("granularity", "statistic", "composite", "model"):
            mine, theirs = getattr(first, what), getattr(relevance, what)
            if mine != theirs:
                yield f"sets {first_name!r} and {name!r} were collected with {what} {mine!r} and {theirs!r}: collect them alike"
        check_rules(first, relevance, f"put {first_name!r} and {name!r} together:")
        check_shapes(first, relevance, f"put {first_name!r} and {name!r} together:")
    for name, relevance in sets.items():
        if not len(relevance):
            yield f"set {name!r} holds no tensor: was it empty?"
        elif not has_any(relevance, {tensor: relevance.sharding(tensor) for tensor in relevance}):
            yield f"set {name!r} is zero everywhere: was it empty, or the target constant?"
