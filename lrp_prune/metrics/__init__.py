"""Metrics of what a correction does and costs: torchmetrics, with a function beside each."""

from lrp_prune.metrics.agreement import GreedyAgreement, greedy_agreement
from lrp_prune.metrics.divergence import KLToBase, kl_to_base
from lrp_prune.metrics.perplexity import Perplexity, perplexity
from lrp_prune.metrics.toxicity import Toxicity, toxicity
from lrp_prune.metrics.uniqueness import ResponseUniquenessRatio, response_uniqueness_ratio

__all__ = [
    "GreedyAgreement",
    "KLToBase",
    "Perplexity",
    "ResponseUniquenessRatio",
    "Toxicity",
    "greedy_agreement",
    "kl_to_base",
    "perplexity",
    "response_uniqueness_ratio",
    "toxicity",
]
