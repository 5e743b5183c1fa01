"""What a sparsity is the share of: everything that was asked for, also where a part of it could not be scored."""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lrp_prune.relevance.unscored import TOLERABLE, UnscoredWeightsWarning, described, entries_of, patterns_of, share
from lrp_prune.selection.scopes import Structure, groups_by_pattern, number_to_prune

if TYPE_CHECKING:
    from lrp_prune.pruning.masks import Masks
    from lrp_prune.relevance import Relevance

TOLERANCE = 0.05
"""The share of unscored weights up to which a scope that cannot make up for them goes on, and says so.

An expert that no token went to, a pooler that the loss does not look at: with a few percent of the weights left dense the result
is what was asked for to the precision that matters, and is reported as what it is. With more it is something else.
"""


class Group(NamedTuple):
    """Weights that are selected from together.

    Args:
        scored: names with relevance.
        unscored: names without, and why.
        rate: the share of all of them that is to be pruned.
        number: how many of the scored ones that is where all are compared with each other.
    """

    scored: list[str]
    unscored: dict[str, str]
    rate: float
    number: int


def groups_of(
    relevance: "Relevance",
    sparsity: float | Mapping[str, float],
    scope: str | Structure,
    existing: "Masks | None" = None,
) -> list[Group]:
    """What is selected from together, and how many of it: a share of all that was asked for, taken from what is scored.

    With scope ``"global"`` the scored weights make up for the others, so that exactly the share of all is pruned. Any other
    scope prunes its share of each scored tensor and leaves the others dense, if these are few.

    Raises:
        ValueError: if a pattern matches nothing or only unscored weights, a weight's zeros would be none in what is used, or
            the sparsity cannot be met with what is scored.
    """
    whole = relevance.granularity == "weight"
    unscored = relevance.unscored if whole else {}
    names = [*relevance, *(name for name in unscored if name not in relevance)]
    groups = []
    for pattern, chosen, rate in groups_by_pattern(names, sparsity):
        scored = [name for name in chosen if name not in unscored]
        missing = {name: unscored[name] for name in chosen if name in unscored}
        refuse_unusable(missing)
        what = f"sparsity {rate:g}" if pattern is None else f"sparsity[{pattern!r}] = {rate:g}"
        if not scored:
            raise ValueError(f"{what} is of weights that are not scored: {described(missing)}")
        count = 0
        if whole:
            count = _count(relevance, scored, missing, rate, what, scope == "global", existing)
        for kind in map(set, relevance.kinds().values()):  # what is a head is not compared with what is a neuron
            among = [name for name in scored if name in kind]
            if among:
                groups.append(Group(among, missing, rate, count))
    return groups


def _count(
    relevance: "Relevance",
    scored: list[str],
    missing: Mapping[str, str],
    rate: float,
    what: str,
    together: bool,
    existing: "Masks | None",
) -> int:
    shapes = relevance.parameter_shapes
    of_scored, of_missing = entries_of(scored, shapes), entries_of(missing, shapes)
    total = of_scored + of_missing
    pruned = sum(existing.pruned_in(name) for name in missing if name in existing) if existing is not None else 0
    count = number_to_prune(rate, total) - pruned
    if count < 0:
        raise ValueError(
            f"{what} of {total:,} weights is {number_to_prune(rate, total):,}, but {pruned:,} are pruned already in "
            f"{', '.join(patterns_of(missing))} alone: sparsity is total, ask for at least as much"
        )
    if not missing or rate == 0:
        return count
    if together and count >= of_scored:
        raise ValueError(
            f"{what} of {total:,} weights is {number_to_prune(rate, total):,}, and only {of_scored:,} of them are scored. "
            f"{_ways_out(missing)}"
        )
    known = entries_of((name for name in missing if existing is not None and name in existing), shapes)
    if not together and of_missing - known > TOLERANCE * total:
        further = " use scope='global', in which the others make up for them;"
        raise ValueError(
            f"{what} cannot be reached: each tensor is selected from by itself, and {share(of_missing, total)} are not "
            f"scored, which would stay dense. {_ways_out(missing, further)}"
        )
    return count


def refuse_unusable(reasons: Mapping[str, str]) -> None:
    """Refuse weights whose zeros would be none in what is used.

    Raises:
        ValueError: if a reason is of that kind.
    """
    found = {name: reason for name, reason in reasons.items() if reason not in TOLERABLE}
    if found:
        raise ValueError(f"cannot prune {described(found)}. Leave them out by exclude={patterns_of(found)!r}")


def _ways_out(missing: Mapping[str, str], further: str = "") -> str:
    return (
        f"Not scored: {described(missing)}. Leave them out by exclude={patterns_of(missing)!r}, so that the sparsity is of the "
        f"others;{further} or take another method or composite"
    )


def tell_unscored(groups: Sequence[Group], relevance: "Relevance", masks: "Masks") -> None:
    """Warn, once a selection, of what stays dense for lack of relevance."""
    missing = {name: reason for group in groups for name, reason in group.unscored.items() if name in masks.unscored}
    if not missing:
        return
    shapes = relevance.parameter_shapes
    of_missing = entries_of(missing, shapes)
    of_scored = entries_of((name for group in groups for name in group.scored), shapes)
    in_scored = sum(masks.pruned_in(name) for group in groups for name in group.scored)
    warnings.warn(
        f"{share(of_missing, of_missing + of_scored)} are not scored and stay dense: {described(missing)}. "
        f"The others are pruned to {in_scored / max(of_scored, 1):.2%}, which is {masks.sparsity:.2%} of all. Leave them out by "
        f"exclude={patterns_of(missing)!r} for a sparsity of the others",
        UnscoredWeightsWarning,
        stacklevel=3,
    )
