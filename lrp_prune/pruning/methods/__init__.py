"""Pruning methods: objects that say what is collected, how it is scored, and what scores are best compared with.

A new one is one file with a subclass of :class:`Method`, and an entry in :data:`METHODS` if it is to have a name.
"""

from lrp_prune.pruning.methods.base import Collects, Method, Scorable, check_scores, collected_by, kinds_without_data
from lrp_prune.pruning.methods.data_free import Magnitude, Random
from lrp_prune.pruning.methods.propagating import LRP, Gradient
from lrp_prune.pruning.methods.wanda import Wanda

__all__ = [
    "LRP",
    "METHODS",
    "Collects",
    "Gradient",
    "Magnitude",
    "Method",
    "Random",
    "Scorable",
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
"""Methods by the name that stands for them with all their defaults."""


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
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method must be one of {tuple(METHODS)} or an object such as LRP(), got {method!r}")
    return METHODS[method]()
