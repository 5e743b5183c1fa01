"""Compensation: kept weights make up for what is pruned."""

from lrp_prune.pruning.compensation.compensated import Compensated
from lrp_prune.pruning.compensation.compensating import compensate_
from lrp_prune.pruning.compensation.ways import Compensation, LeastSquares, OptimalBrainSurgeon, compensation_of

__all__ = [
    "Compensated",
    "Compensation",
    "LeastSquares",
    "OptimalBrainSurgeon",
    "compensate_",
    "compensation_of",
]
