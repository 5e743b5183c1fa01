"""Weights that were asked for and that nothing is known about: why, how many, and how to say so."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lrp_prune.names import matches

if TYPE_CHECKING:
    from lrp_prune.relevance.relevance import Relevance

UNUSED = "was used in no forward of the reference samples (an expert without tokens, a part that does not run)"
NO_PRODUCT = "is used, but in no product with activations that is observed"
CONSTANTS = (
    "multiplies constants only, such as embeddings of positions, and no relevance goes through these; what is computed from "
    "whole numbers, as times are, is one as well unless they are given as floats"
)
DATA = "enters as data: it, or a sum of its rows, is added to activations or put beside them"
WITHOUT_GRADIENTS = "ran without gradients (torch.no_grad inside the model), and no relevance goes there: enable them"
TRANSFORMED = "is used inside a transformation of torch.func, such as vmap, and relevance is not followed into these"
GATES = "belongs to gates in part, and the rules stop relevance before them: most of its rows would count as irrelevant"
UNREACHED = "no relevance reaches it: what is explained does not depend on it, or the rules stop before it"
RESCALED = (
    "what is used is divided by a norm of it, so that pruning some of its entries would change the others, and a row without "
    "any left would be divided by zero: take the reparametrization off before pruning"
)
DIVIDED = "it is divided among processes, and computed with before it is used"
RULES_DIFFER = "it is used under rules of which one leaves out of account how large it is, and another does not"
SEVERAL = "it is used with several values, scaled differently"

TOLERABLE = frozenset({
    UNUSED, NO_PRODUCT, CONSTANTS, DATA, WITHOUT_GRADIENTS, TRANSFORMED, GATES, UNREACHED,
})  # fmt: skip
"""Reasons that lie in the samples, the target and the rules: other weights can be pruned in these weights' place.

Any other says that zeros in the parameter would be none in what is used. To prune these was asked for by mistake, and is refused.
"""

_SHOWN = 6


class UnscoredWeightsWarning(UserWarning):
    """Weights that were asked for could not be scored, and stay as they are."""


def tell_nothing(relevance: "Relevance", stacklevel: int) -> None:
    """Warn of relevance for a target that is zero everywhere; of sharded one, of which a process has a part, it is not asked."""
    if (
        not relevance.num_samples
        or not relevance.target
        or relevance.shardings
        or any(bool((relevance.sums[name] != 0).any()) for name in relevance)
    ):
        return
    warnings.warn(
        f"relevance is zero everywhere: target {relevance.target!r} explained nothing of {relevance.num_samples} samples (no "
        "label that counts, or an output that depends on nothing), and what is selected by it is arbitrary",
        UnscoredWeightsWarning,
        stacklevel=stacklevel,
    )


def computed(steps: Iterable[str]) -> str:
    """The reason where zeros in a parameter are none in what is made of it."""
    return f"what is used is computed from it (by {', '.join(dict.fromkeys(steps))}), and its zeros would be none there"


def together(mine: Mapping[str, str], theirs: Mapping[str, str]) -> dict[str, str]:
    """The reasons of two collections: the one that knows of a use is the one that says more."""
    found = {**theirs, **mine}
    return {name: theirs.get(name, reason) if reason == UNUSED else reason for name, reason in found.items()}


def patterns_of(names: Iterable[str]) -> list[str]:
    """Few patterns for many names: those that differ in numbers of blocks only become one.

    Example:
        >>> patterns_of(["layers.0.q.weight", "layers.1.q.weight", "head.weight"])
        ['layers.*.q.weight', 'head.weight']
    """
    found: dict[str, list[str]] = {}
    for name in names:
        key = ".".join("*" if part.isdigit() else part for part in name.split("."))
        found.setdefault(key, []).append(name)
    return [members[0] if len(members) == 1 else key for key, members in found.items()]


def entries_of(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many weights parameters of these names have."""
    return sum(math.prod(shapes[name]) for name in names)


def described(reasons: Mapping[str, str]) -> str:
    """Names by reason, as few words as they can be told in.

    Example:
        >>> described({"layers.0.q.weight": DATA, "layers.1.q.weight": DATA})
        'layers.*.q.weight (enters as data: it, or a sum of its rows, is added to activations or put beside them)'
    """
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    parts = []
    for reason, names in by_reason.items():
        patterns = patterns_of(names)
        more = f" and {len(patterns) - _SHOWN} more" if len(patterns) > _SHOWN else ""
        parts.append(f"{', '.join(patterns[:_SHOWN])}{more} ({reason})")
    return "; ".join(parts)


def check_included(include: Sequence[str] | None, scored: Iterable[str], unscored: Mapping[str, str]) -> None:
    """Refuse patterns that name nothing but weights without relevance.

    Raises:
        ValueError: if there is one; with the reasons.
    """
    names = list(scored)
    for pattern in include or ():
        found = {name: reason for name, reason in unscored.items() if matches(name, [pattern])}
        if found and not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"include pattern {pattern!r} names only weights that are not scored: {described(found)}")


def share(part: int, whole: int) -> str:
    """``"9 of 258 weights (3.5 %)"``."""
    return f"{part:,} of {whole:,} weights ({100 * part / max(whole, 1):.1f} %)"
