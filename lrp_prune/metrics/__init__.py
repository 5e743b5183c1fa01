"""Metrics of what a pruning or a correction does and costs: torchmetrics, with a function beside each."""

from lrp_prune.metrics.agreement import GreedyAgreement, greedy_agreement
from lrp_prune.metrics.divergence import KLToBase, kl_to_base
from lrp_prune.metrics.perplexity import Perplexity, perplexity
from lrp_prune.metrics.pruning import PruningArea, TopPruningRate, pruning_area, top_pruning_rate
from lrp_prune.metrics.toxicity import Toxicity, toxicity
from lrp_prune.metrics.uniqueness import ResponseUniquenessRatio, response_uniqueness_ratio

__all__ = [
    "GreedyAgreement",
    "KLToBase",
    "Perplexity",
    "PruningArea",
    "ResponseUniquenessRatio",
    "TopPruningRate",
    "Toxicity",
    "greedy_agreement",
    "kl_to_base",
    "perplexity",
    "pruning_area",
    "response_uniqueness_ratio",
    "top_pruning_rate",
    "toxicity",
]
