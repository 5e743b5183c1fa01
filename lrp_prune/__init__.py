"""Prune, dissect and correct PyTorch models by layer-wise relevance propagation (LRP).

Data flows one way: a model and batches give a :class:`Relevance` (:func:`attribute`), a relevance gives :class:`Masks`
(:func:`select`), masks give a pruned model; :func:`prune` does all three. ``lrp_prune.correction`` turns the contrast of two
relevances into a reversible :class:`Patch`, ``lrp_prune.circuits`` finds and evaluates circuits on ``lrp_prune.tasks``. The
Lightning callbacks are in ``lrp_prune.callbacks``.
"""

from lrp_prune.attribution import Composite, Propagation, attribute, attributing, register_rule
from lrp_prune.correction import Patch
from lrp_prune.planning import Estimate, estimate
from lrp_prune.pruning import Masks, merge_adapters, prune, select
from lrp_prune.relevance import Member, Relevance

__all__ = [
    "Composite",
    "CorrectedModule",
    "Estimate",
    "Masks",
    "Member",
    "Patch",
    "Propagation",
    "Relevance",
    "attribute",
    "attributing",
    "estimate",
    "merge_adapters",
    "prune",
    "register_rule",
    "select",
]


def __getattr__(name: str) -> object:
    if name == "CorrectedModule":  # the only public name here that needs Lightning
        from lrp_prune.module import CorrectedModule

        return CorrectedModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
