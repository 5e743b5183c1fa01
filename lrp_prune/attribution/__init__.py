"""Attribution: model and batch in, relevance out."""

from lrp_prune.attribution.collect import RelevanceAccumulator, attribute
from lrp_prune.engine.audit import UnfoldedNormalizationWarning, UnruledOperationError, UnruledOperationWarning
from lrp_prune.engine.composites import COMPOSITES, Composite, Where, epsilon_gamma_box
from lrp_prune.engine.propagation import Propagation, attributing
from lrp_prune.engine.registry import register_rule
from lrp_prune.engine.rules import (
    RULES,
    AlphaBeta,
    Epsilon,
    EpsilonSum,
    EqualShares,
    Flat,
    Gamma,
    Group,
    Proportional,
    Rule,
    SizeShares,
    Term,
    Terms,
    Winner,
    WSquare,
    ZBox,
    ZPlus,
)
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
    "AlphaBeta",
    "ClassLogit",
    "Composite",
    "Epsilon",
    "EpsilonSum",
    "EqualShares",
    "Flat",
    "Gamma",
    "Group",
    "LastToken",
    "LogitDifference",
    "NextToken",
    "Propagation",
    "Proportional",
    "RelevanceAccumulator",
    "RepetitionMargin",
    "Rule",
    "SizeShares",
    "Target",
    "Term",
    "Terms",
    "TokenMargin",
    "UnfoldedNormalizationWarning",
    "UnruledOperationError",
    "UnruledOperationWarning",
    "WSquare",
    "Where",
    "Winner",
    "ZBox",
    "ZPlus",
    "attribute",
    "attributing",
    "epsilon_gamma_box",
    "register_rule",
]
