"""Relevance to look at: explanations of inputs, pages and figures, and the samples that a unit is most relevant for."""

from lrp_prune.visualization.explaining import explain
from lrp_prune.visualization.explanation import Explanation
from lrp_prune.visualization.maximizing import TopSamples, top_samples
from lrp_prune.visualization.parts import Pixels, Tokens
from lrp_prune.visualization.units import plot_by_layer, plot_heads

__all__ = [
    "Explanation",
    "Pixels",
    "Tokens",
    "TopSamples",
    "explain",
    "plot_by_layer",
    "plot_heads",
    "top_samples",
]
