"""How strongly kept weights are held where they were: as much as makes one half of the samples good for the other."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lrp_prune.pruning.compensation.matrices import Matrix
from lrp_prune.pruning.compensation.solving import least_squares
from lrp_prune.pruning.compensation.systems import MANY, Systems

LEAST = 0.01
"""As a fraction of the mean square of inputs: what is usual."""
STRENGTHS = (LEAST, 0.03, 0.1, 0.3, 1.0, 3.0)
_ROWS = 16
"""Outputs of a layer that are tried."""
_STEPS = 50


def damping_of(asked: float | None, systems: Systems, weight: Matrix, gram: Tensor) -> float:
    """What is asked for; else, of few samples, what makes one half of them good for the other, and 0.01 of many.

    How few are few is not told by their number: 128 rows for the 128 inputs of a regression's layers want 0.01 (at 90 % pruned,
    0.98 of its advantage are kept, with 1 0.93), where 1,024 tokens of four texts, for the 576 inputs of SmolLM2's layers,
    want 1 (at 50 % a perplexity of 34.0, with 0.01 43.5). So it is tried, on 16
    outputs of the layer: the least squares of one half of the samples, by each of six strengths, and their error on the other.
    It is two-fold cross-validation of a ridge regression, with as much time as some outputs take to be solved.

    Args:
        asked: for; None: chosen here.
        systems: of the layer.
        weight: it.
        gram: of all samples, as the layer's weight has columns.
    """
    if asked is not None:
        return asked
    if systems.count >= MANY * systems.inputs:
        return LEAST
    if systems.first is None:  # nothing tells
        return STRENGTHS[-1]
    width, dense = gram.shape[-1], weight.dense
    errors = [0.0] * len(STRENGTHS)
    for group, rows in _tried(dense.shape[0], dense.shape[1]):
        first = systems.first[group, :width, :width].to(gram.dtype)
        halves = (first, gram[group] - first)
        kept, wanted = weight.kept[group, rows], dense[group, rows]
        for fitted, judged in (halves, halves[::-1]):
            size = float(fitted.diagonal()[: systems.inputs].mean())
            if size == 0:  # nothing comes in
                continue
            for index, strength in enumerate(STRENGTHS):
                damped = fitted.clone()
                damped.diagonal().add_(strength * size)
                apart = least_squares(damped, wanted @ damped, kept, wanted, _STEPS) - wanted
                error = float(((apart @ judged) * apart).sum())
                errors[index] += error if math.isfinite(error) else math.inf
    return STRENGTHS[errors.index(min(errors))] if max(errors) > 0 else LEAST


def _tried(groups: int, rows: int) -> Iterator[tuple[int, Tensor]]:
    """Some rows of some groups, evenly spread."""
    for group in _spread(groups, _ROWS).tolist():
        yield group, _spread(rows, max(_ROWS // groups, 1))


def _spread(entries: int, number: int) -> Tensor:
    return torch.linspace(0, entries - 1, min(entries, number), device="cpu").round().long()
