"""Attribution: model and batch in, relevance out."""

from lrp_prune.attribution.collect import RelevanceAccumulator, attribute
from lrp_prune.engine.audit import UnruledOperationError, UnruledOperationWarning
from lrp_prune.engine.composites import COMPOSITES, Composite, epsilon_gamma_box
from lrp_prune.engine.propagation import Propagation, attributing
from lrp_prune.engine.registry import register_rule
from lrp_prune.engine.rules import (
    RULES,
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Group,
    Rule,
    Term,
    Terms,
    WSquare,
    ZBox,
    ZPlus,
)
from lrp_prune.engine.where import Where
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
    "Flat",
    "Gamma",
    "Group",
    "LastToken",
    "LogitDifference",
    "NextToken",
    "Propagation",
    "RelevanceAccumulator",
    "RepetitionMargin",
    "Rule",
    "Target",
    "Term",
    "Terms",
    "TokenMargin",
    "UnruledOperationError",
    "UnruledOperationWarning",
    "WSquare",
    "Where",
    "ZBox",
    "ZPlus",
    "attribute",
    "attributing",
    "epsilon_gamma_box",
    "register_rule",
]
