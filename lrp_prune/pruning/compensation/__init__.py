"""Compensation: kept weights make up for what is pruned."""

from lrp_prune.pruning.compensation.compensating import Compensated, compensate_
from lrp_prune.pruning.compensation.ways import Compensation, LeastSquares, OptimalBrainSurgeon, compensation_of

__all__ = ["Compensated", "Compensation", "LeastSquares", "OptimalBrainSurgeon", "compensate_", "compensation_of"]
