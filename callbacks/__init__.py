"""Lightning callbacks, installed as ``lrp_prune.callbacks``: collecting relevance, and pruning by it in rounds."""

from lrp_prune.callbacks.relevance_collector import RelevanceCollector
from lrp_prune.callbacks.relevance_pruning import RelevancePruning

__all__ = ["RelevanceCollector", "RelevancePruning"]
