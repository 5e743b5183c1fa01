"""Attribution: model and batch in, relevance out."""

from lrp_prune.attribution.audit import UnruledOperationError, UnruledOperationWarning
from lrp_prune.attribution.collect import RelevanceAccumulator, attribute
from lrp_prune.attribution.composites import COMPOSITES, RULES, Composite
from lrp_prune.attribution.propagation import Propagation, attributing
from lrp_prune.attribution.registry import register_rule
from lrp_prune.targets import (
    ClassLogit,
    LastToken,
    LogitDifference,
    NextToken,
    RepetitionMargin,
    Target,
    TokenMargin,
)

__all__ = [
    "COMPOSITES",
    "RULES",
    "ClassLogit",
    "Composite",
    "LastToken",
    "LogitDifference",
    "NextToken",
    "Propagation",
    "RelevanceAccumulator",
    "RepetitionMargin",
    "Target",
    "TokenMargin",
    "UnruledOperationError",
    "UnruledOperationWarning",
    "attribute",
    "attributing",
    "register_rule",
]
