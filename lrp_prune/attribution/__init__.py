"""Attribution: model and batch in, relevance out."""

from lrp_prune.attribution.collect import RelevanceAccumulator, attribute
from lrp_prune.engine.audit import UnfoldedNormalizationWarning, UnruledOperationError, UnruledOperationWarning
from lrp_prune.engine.composites import COMPOSITES, Composite, epsilon_gamma_box
from lrp_prune.engine.propagation import Propagation, attributing
from lrp_prune.engine.registry import register_rule
from lrp_prune.engine.rules import (
    RULES,
    AlphaBeta,
    AttentionZPlus,
    Epsilon,
    EpsilonSum,
    EqualShares,
    Flat,
    Gamma,
    Group,
    Proportional,
    Rule,
    SizeShares,
    SoftmaxZPlus,
    Term,
    Terms,
    Winner,
    WSquare,
    ZBox,
    ZPlus,
)
from lrp_prune.engine.where import Where
from lrp_prune.targets import (
    ClassLabel,
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
    "AttentionZPlus",
    "ClassLabel",
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
    "SoftmaxZPlus",
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
