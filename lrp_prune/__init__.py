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
    mask_adapters,
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
    "AuditReport",
    "Comparison",
    "Composite",
    "CorrectedModule",
    "Estimate",
    "Explanation",
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
    "Shrunk",
    "Statistic",
    "Taylor",
    "Wanda",
    "attribute",
    "attributing",
    "audit",
    "compare",
    "estimate",
    "explain",
    "load_shrunk",
    "mask_adapters",
    "merge_adapters",
    "prune",
    "pruning_curve",
    "reconstruct",
    "register_rule",
    "search_composite",
    "select",
    "shrink",
    "top_samples",
]


# What needs Lightning, or is not always wanted, is imported when it is asked for.
_MODULES = (
    "attribution",
    "auditing",
    "callbacks",
    "circuits",
    "correction",
    "effects",
    "engine",
    "metrics",
    "pruning",
    "reconstruction",
    "relevance",
    "search",
    "shrinking",
    "targets",
    "tasks",
    "visualization",
)


_LATER = {
    "AuditReport": "auditing",
    "Comparison": "pruning.comparison",
    "CorrectedModule": "wrapper.module",
    "Explanation": "visualization",
    "SearchSpace": "search",
    "Shrunk": "shrinking",
    "audit": "auditing",
    "compare": "pruning.comparing",
    "explain": "visualization",
    "load_shrunk": "shrinking",
    "pruning_curve": "pruning.curve",
    "reconstruct": "reconstruction",
    "search_composite": "search",
    "shrink": "shrinking",
    "top_samples": "visualization",
}


def __getattr__(name: str) -> object:
    if name in _LATER:
        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
