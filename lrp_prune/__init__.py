"""Prune, dissect and correct PyTorch models by layer-wise relevance propagation (LRP).

Data flows one way: a model and batches give a :class:`Relevance` (:func:`attribute`), a relevance gives :class:`Masks`
(:func:`select`), masks give a pruned model; :func:`prune` does all three, and :func:`compare` by several methods side by side.
Methods are named, or objects that say more: :class:`LRP`, :class:`Gradient`, :class:`Wanda`, :class:`Magnitude`, :class:`Random`,
and of units alone :class:`Activation`, :class:`Taylor`, :class:`IntegratedGradients`.
``lrp_prune.correction`` turns the contrast of two relevances into a reversible :class:`Patch`, ``lrp_prune.circuits`` finds and
evaluates circuits on ``lrp_prune.tasks``. The Lightning callbacks are in ``lrp_prune.callbacks``.
"""

from importlib import import_module

from lrp_prune.attribution import Composite, Propagation, attribute, attributing, register_rule
from lrp_prune.correction import Patch
from lrp_prune.planning import Estimate, estimate
from lrp_prune.pruning import (
    LRP,
    Activation,
    Gradient,
    IntegratedGradients,
    Magnitude,
    Masks,
    Method,
    Random,
    Scope,
    Taylor,
    Wanda,
    merge_adapters,
    prune,
    select,
)
from lrp_prune.relevance import Relevance
from lrp_prune.relevance.members import Member
from lrp_prune.relevance.statistics import Statistic

__all__ = [
    "LRP",
    "Activation",
    "Comparison",
    "Composite",
    "CorrectedModule",
    "Estimate",
    "Gradient",
    "IntegratedGradients",
    "Magnitude",
    "Masks",
    "Member",
    "Method",
    "Patch",
    "Propagation",
    "Random",
    "Relevance",
    "Scope",
    "SearchSpace",
    "Statistic",
    "Taylor",
    "Wanda",
    "attribute",
    "attributing",
    "compare",
    "estimate",
    "merge_adapters",
    "prune",
    "pruning_curve",
    "register_rule",
    "search_composite",
    "select",
]


# What needs Lightning, or is not always wanted, is imported when it is asked for.
_MODULES = (
    "attribution",
    "callbacks",
    "circuits",
    "correction",
    "effects",
    "engine",
    "metrics",
    "pruning",
    "relevance",
    "search",
    "targets",
    "tasks",
)


def __getattr__(name: str) -> object:
    if name == "CorrectedModule":
        from lrp_prune.wrapper.module import CorrectedModule

        return CorrectedModule
    if name == "compare":
        from lrp_prune.pruning.comparing import compare

        return compare
    if name == "pruning_curve":
        from lrp_prune.pruning.curve import pruning_curve

        return pruning_curve
    if name in ("SearchSpace", "search_composite"):
        return getattr(import_module("lrp_prune.search"), name)
    if name == "Comparison":
        from lrp_prune.pruning.comparison import Comparison

        return Comparison
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
