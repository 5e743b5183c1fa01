"""Relevance to masks to models: scorers, scopes, exact selection, masks, schedules, keeping zeros."""

from lrp_prune.pruning.checking import check_uses
from lrp_prune.pruning.compensation import Compensated, Compensation, LeastSquares, OptimalBrainSurgeon
from lrp_prune.pruning.emptied import EmptiedWeightsWarning
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.merging import merge_adapters
from lrp_prune.pruning.methods import (
    LRP,
    METHODS,
    UNIT_METHODS,
    Activation,
    Collects,
    Gradient,
    IntegratedGradients,
    Magnitude,
    Method,
    Random,
    Scorable,
    Taylor,
    UnitMethod,
    Wanda,
)
from lrp_prune.pruning.prune import prune
from lrp_prune.pruning.recalibration import Recalibration, recalibrate
from lrp_prune.pruning.saving import Saved, check_saved, save_pruned
from lrp_prune.pruning.schedules import SCHEDULES, Schedule, sparsity_schedule
from lrp_prune.pruning.scope import Scope
from lrp_prune.pruning.scorers import Scorer, scorer
from lrp_prune.pruning.select import select
from lrp_prune.pruning.sparse_adapters import mask_adapters

__all__ = [
    "LRP",
    "METHODS",
    "SCHEDULES",
    "UNIT_METHODS",
    "Activation",
    "Collects",
    "Compensated",
    "Compensation",
    "EmptiedWeightsWarning",
    "Gradient",
    "IntegratedGradients",
    "LeastSquares",
    "Magnitude",
    "Masks",
    "Method",
    "OptimalBrainSurgeon",
    "Random",
    "Recalibration",
    "Saved",
    "Schedule",
    "Scope",
    "Scorable",
    "Scorer",
    "Taylor",
    "UnitMethod",
    "Wanda",
    "check_saved",
    "check_uses",
    "mask_adapters",
    "merge_adapters",
    "prune",
    "recalibrate",
    "save_pruned",
    "scorer",
    "select",
    "sparsity_schedule",
]
