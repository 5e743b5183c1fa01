"""Pruning methods: objects that say what is collected, how it is scored, and what scores are best compared with.

A new one is one file with a subclass of :class:`Method`, and an entry in :data:`METHODS` if it is to have a name, or in
:data:`UNIT_METHODS` if it scores units alone (:class:`UnitMethod`).
"""

from lrp_prune.pruning.methods.activation import Activation
from lrp_prune.pruning.methods.base import Collects, Method, Scorable, check_scores, collected_by, kinds_without_data
from lrp_prune.pruning.methods.data_free import Magnitude, Random
from lrp_prune.pruning.methods.integrated_gradients import IntegratedGradients
from lrp_prune.pruning.methods.of_units import UnitMethod
from lrp_prune.pruning.methods.propagating import LRP, Gradient
from lrp_prune.pruning.methods.taylor import Taylor
from lrp_prune.pruning.methods.wanda import Wanda

__all__ = [
    "LRP",
    "METHODS",
    "UNIT_METHODS",
    "Activation",
    "Collects",
    "Gradient",
    "IntegratedGradients",
    "Magnitude",
    "Method",
    "Random",
    "Scorable",
    "Taylor",
    "UnitMethod",
    "Wanda",
    "check_scores",
    "collected_by",
    "kinds_without_data",
    "method_of",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (LRP, Gradient, Wanda, Magnitude, Random)  # in the order of tables
}
"""Methods of weights and units by the name that stands for them with all their defaults."""

UNIT_METHODS: dict[str, type[Method]] = {method.name: method for method in (Activation, Taylor, IntegratedGradients)}
"""Those that score units alone."""


def method_of(method: str | Method) -> Method:
    """The method that is meant by a name, or is given.

    Raises:
        ValueError: if there is none of that name.

    Example:
        >>> method_of("random"), method_of(Random(seed=3))
        (Random(seed=0, target=None), Random(seed=3, target=None))
    """
    if isinstance(method, Method):
        return method
    known = {**METHODS, **UNIT_METHODS}
    if not isinstance(method, str) or method not in known:
        raise ValueError(f"method must be one of {tuple(known)} or an object such as LRP(), got {method!r}")
    return known[method]()
