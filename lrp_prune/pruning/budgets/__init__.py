"""Budgets: how much of each tensor goes, decided before anything is selected; each is a sparsity by name, for any method."""

from lrp_prune.pruning.budgets.budget import Budget
from lrp_prune.pruning.budgets.outliers import outlier_weighted
from lrp_prune.pruning.budgets.sensitivity import measured
from lrp_prune.pruning.budgets.spectra import heavy_tailed, tail_exponent

__all__ = ["Budget", "heavy_tailed", "measured", "outlier_weighted", "tail_exponent"]
