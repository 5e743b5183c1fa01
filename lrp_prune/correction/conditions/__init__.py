"""Conditions: where a correction acts and where it leaves everything as it is."""

from lrp_prune.correction.conditions.activation import ActivationAbove
from lrp_prune.correction.conditions.condition import Condition, restored
from lrp_prune.correction.conditions.learning import Learned

__all__ = ["ActivationAbove", "Condition", "Learned", "restored"]
