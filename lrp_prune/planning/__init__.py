"""Planning: how many bytes collecting and pruning take in each process, before anything is loaded."""

from lrp_prune.planning.estimating import Estimate, estimate

__all__ = ["Estimate", "estimate"]
