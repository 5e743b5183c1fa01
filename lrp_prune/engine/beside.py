"""Relevance beside the gradient: what a rule gives to entries of an input that are zero.

Relevance is the input times the gradient, so that no gradient can carry what a zero gets, of rules whose shares do not depend
on the input. Where the input is data, moved at most, it is noted with the data; inside a model it ends there, like a bias's.
"""

import torch
from torch import Tensor

from lrp_prune.engine.facts import Fact
from lrp_prune.engine.nodes import MOVING_NODES, node_kind

_BESIDE: Fact[Tensor] = Fact("beside")
beside = _BESIDE.of


def data_of(activation: Tensor) -> Tensor | None:
    """The leaf of the graph whose entries an activation has, in whatever order; None if it is none."""
    node = activation.grad_fn
    if node is None:
        return activation if activation.requires_grad else None
    while node is not None and node_kind(node) in MOVING_NODES:
        before = [entry for entry, _ in node.next_functions if entry is not None]
        node = before[0] if len(before) == 1 else None
    leaf = getattr(node, "variable", None)
    return leaf if isinstance(leaf, Tensor) else None


def note_beside(activation: Tensor, relevance: Tensor) -> None:
    """Note relevance of entries of an activation with the data that they are."""
    leaf = data_of(activation)
    if leaf is None:
        return
    if leaf is not activation:
        (relevance,) = torch.autograd.grad(activation, leaf, relevance.to(activation.dtype), retain_graph=True)
    known = _BESIDE.of(leaf)
    _BESIDE.note(leaf, relevance if known is None else known + relevance)
