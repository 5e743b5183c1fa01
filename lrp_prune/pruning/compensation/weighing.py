"""Tokens weighed by their relevance: what a layer does to tokens that matter counts for more."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.attribution.inputs import target_for
from lrp_prune.engine.composites import composite_of
from lrp_prune.engine.propagation import propagating
from lrp_prune.engine.unaltered import unaltered
from lrp_prune.engine.uses import WeightUses
from lrp_prune.targets import values_of


def weights_of_tokens(module: nn.Module, batch: Any, target: Any, stages: Sequence[str]) -> dict[str, Tensor]:
    r"""Of each stage that has relevance by position, the weights of its tokens, ``[samples, tokens]``.

    A token's weight is the root of the absolute relevance of what the stage gives there, summed over channels, as ``attnlrp``
    propagates it from what is explained; of samples without tokens (vectors, images) the sample's, ``[samples, 1]``. Without the
    root a few tokens are nearly all that counts, which was worse.

    Args:
        module: the dense model.
        batch: reference samples, on its device.
        target: what is explained; None for the logit of what is predicted.
        stages: names of modules.
    """
    with unaltered(module):
        explained = target_for(module, batch, target)
        rules = composite_of("attnlrp")
        with propagating(module, rules, stages, "ignore", WeightUses(), constants=True) as propagation:
            entries = propagation.entries(values_of(explained, module, batch).sum())
    found = {root.name: relevance for root, relevance in entries if root.latent}
    weights = {}
    for name in stages:
        relevance = found.get(name)
        if relevance is not None and relevance.dim() > 1:
            each = relevance.detach().abs().float()
            weights[name] = (each.sum(-1) if each.dim() == 3 else each.flatten(1).sum(1, keepdim=True)).sqrt()
    return weights


def weights_of_rows(weights: Tensor, x: Tensor, counted: Tensor | None, by_place: bool = False) -> Tensor | None:
    """The weights of a layer's rows ``[rows]``: its tokens', else its samples', for each place; None where neither is known.

    Args:
        weights: ``[samples, tokens]``.
        x: what the layer gets; channels last, or of a convolution behind the samples.
        counted: ``[samples, tokens]``, which are no padding; None for all.
        by_place: whether the layer is a convolution, whose places are no tokens.
    """
    if len(x) != len(weights):
        return None
    if x.dim() == 3 and not by_place and x.shape[:2] == weights.shape:
        return weights[counted] if counted is not None and counted.shape == weights.shape else weights.flatten()
    return weights.mean(1)


def roots_of_weights(weights: Tensor | None, rows: Sequence[Tensor]) -> list[Tensor | float]:
    """What the rows ``[groups, rows, in]`` of one layer are multiplied by, as each weight may be for several in a row."""
    number = sum(entry.shape[1] for entry in rows)
    if weights is None or not number or number % len(weights):
        return [1.0] * len(rows)
    each = weights.to(rows[0].device, torch.float32).sqrt().repeat_interleave(number // len(weights))
    return [part[:, None] for part in torch.split(each, [entry.shape[1] for entry in rows])]
