"""Prune, dissect and correct PyTorch models by layer-wise relevance propagation (LRP).

Data flows one way: a model and batches give a :class:`Relevance` (:func:`attribute`), a relevance gives :class:`Masks`
(:func:`select`), masks give a pruned model; :func:`prune` does all three. The Lightning callbacks are in
``lrp_prune.callbacks``.
"""

from lrp_prune.attribution import Composite, Propagation, attribute, attributing, register_rule
from lrp_prune.pruning import Masks, prune, select
from lrp_prune.relevance import Member, Relevance

__all__ = [
    "Composite",
    "Masks",
    "Member",
    "Propagation",
    "Relevance",
    "attribute",
    "attributing",
    "prune",
    "register_rule",
    "select",
]
