"""Relevance: sums that add and values that are read, which entries they are about, and what is unknown."""

from lrp_prune.relevance.granularity import GRANULARITIES, Granularity, granularities_of
from lrp_prune.relevance.relevance import NORMALIZATIONS, Relevance

__all__ = [
    "GRANULARITIES",
    "NORMALIZATIONS",
    "Granularity",
    "Relevance",
    "granularities_of",
]
