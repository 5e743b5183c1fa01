"""Lightning callbacks, installed as ``lrp_prune.callbacks``: collecting relevance, pruning, correcting, finding circuits."""

from lrp_prune.callbacks._rounds import Rounds
from lrp_prune.callbacks.circuit_discovery import CircuitDiscovery
from lrp_prune.callbacks.contrastive_correction import ContrastiveCorrection
from lrp_prune.callbacks.distillation import Distillation
from lrp_prune.callbacks.learning_rate_rewinding import LearningRateRewinding
from lrp_prune.callbacks.relevance_collector import RelevanceCollector
from lrp_prune.callbacks.relevance_pruning import RelevancePruning
from lrp_prune.callbacks.round_quality import RoundPoint, RoundQuality
from lrp_prune.correction import Guard

__all__ = [
    "CircuitDiscovery",
    "ContrastiveCorrection",
    "Distillation",
    "Guard",
    "LearningRateRewinding",
    "RelevanceCollector",
    "RelevancePruning",
    "RoundPoint",
    "RoundQuality",
    "Rounds",
]
