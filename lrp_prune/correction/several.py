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
    factors = _weights(sets, weights or {})
    found = Together(combination, factors)
    for name, relevance in sets.items():
        found.add(name, relevance)
    return found.compute()


class Together:
    """What :func:`together` does, set by set: what is held is the sum and the first set, however many there are.

    Example:
        >>> found = Together("largest")
        >>> for name, values in (("text", [6.0, 2.0]), ("copying", [0.0, -1.0])):
        ...     found.add(name, Relevance({"weight": torch.tensor(values)}, statistic="signed"))
        >>> found.compute()["weight"], found.compute().target
        (tensor([0.7500, 1.0000]), 'largest of text, copying')
    """

    def __init__(self, combination: str = "mean", weights: Mapping[str, float] | None = None) -> None:
        if combination not in COMBINATIONS:
            raise ValueError(f"combination must be one of {COMBINATIONS}, got {combination!r}")
        self._combination, self._weights = combination, dict(weights or {})
        self._values: dict[str, Tensor] = {}
        self._named: dict[str, Relevance] = {}
        """The first set, and of the others what they are without their values."""
        self._factors = 0.0

    def add(self, name: str, relevance: Relevance) -> None:
        """One more set.

        Raises:
            ValueError: if it has nothing but zeros, or was collected differently from the first.
        """
        for problem in _differences({**dict(list(self._named.items())[:1]), name: relevance}):
            raise ValueError(problem)
        factor = self._weights.get(name, 1.0)
        scaled = relevance.normalized("total")
        for tensor in scaled:
            part = scaled.local(tensor) * factor
            part = part.abs() if self._combination == "largest" else part
            mine = self._values.get(tensor)
            self._values[tensor] = part if mine is None else _combined(mine, part.to(mine.device), self._combination)
        self._factors += factor
        self._named[name] = relevance._replace({}) if self._named else relevance

    def compute(self) -> Relevance:
        """All of them in one.

        Raises:
            ValueError: if there is none.
        """
        if not self._named:
            raise ValueError("several sets are at least one: none is named")
        several = self._named.values()
        first, scale = next(iter(several)), self._factors if self._combination == "mean" else 1.0
        return first._replace(
            {name: value / scale for name, value in self._values.items()},
            num_samples=sum(each.num_samples for each in several),
            parameter_shapes={name: shape for each in several for name, shape in each.parameter_shapes.items()},
            shardings={name: sharding for each in several for name, sharding in each.shardings.items()},
            members={name: members for each in several for name, members in each.members.items()},
            unscored={name: reason for name, reason in first.unscored.items() if name not in self._values},
            target=f"{self._combination} of {', '.join(self._named)}",
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
