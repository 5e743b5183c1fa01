"""What a pruning or a correction does and costs: torchmetrics, a function beside each, and side effects over a suite."""

from lrp_prune.effects import (
    ALLOWED,
    Effect,
    Interval,
    SideEffectError,
    SideEffects,
    Suite,
    side_effects,
    windows,
)
from lrp_prune.metrics.agreement import GreedyAgreement, greedy_agreement
from lrp_prune.metrics.divergence import KLToBase, kl_to_base
from lrp_prune.metrics.faithfulness import perturbation_curve
from lrp_prune.metrics.perplexity import Perplexity, perplexity
from lrp_prune.metrics.perturbed import PerturbationCurve, plot_curves
from lrp_prune.metrics.pruning import PruningArea, TopPruningRate, pruning_area, top_pruning_rate
from lrp_prune.metrics.toxicity import Toxicity, toxicity
from lrp_prune.metrics.uniqueness import ResponseUniquenessRatio, response_uniqueness_ratio

__all__ = [
    "ALLOWED",
    "Effect",
    "GreedyAgreement",
    "Interval",
    "KLToBase",
    "Perplexity",
    "PerturbationCurve",
    "PruningArea",
    "ResponseUniquenessRatio",
    "SideEffectError",
    "SideEffects",
    "Suite",
    "TopPruningRate",
    "Toxicity",
    "greedy_agreement",
    "kl_to_base",
    "perplexity",
    "perturbation_curve",
    "plot_curves",
    "pruning_area",
    "response_uniqueness_ratio",
    "side_effects",
    "top_pruning_rate",
    "toxicity",
    "windows",
]
