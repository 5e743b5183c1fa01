"""The best rules and statistic that were measured, for whoever does not choose: one set, wherever relevance is collected."""

from collections.abc import Sequence
from typing import NamedTuple

from lrp_prune.relevance import granularities_of


class Best(NamedTuple):
    """Composite and statistic."""

    composite: str
    statistic: str


def best_for(granularity: str | Sequence[str]) -> Best:
    """What relevance is best collected by.

    Weights are ranked by LRP-epsilon, whose scale is comparable between layers, together with what a weight contributes to its
    layer's output (``geometric``); units by AttnLRP over tokens.

    Example:
        >>> best_for("weight"), best_for("head").composite
        (Best(composite='epsilon', statistic='geometric'), 'attnlrp')
    """
    if granularities_of(granularity) == ("weight",):
        return Best("epsilon", "geometric")
    return Best("attnlrp", "abs_token")
