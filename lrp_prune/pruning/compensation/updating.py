"""Solving for one layer, and writing what comes out."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lrp_prune.pruning.compensation.matrices import Matrix
from lrp_prune.pruning.compensation.systems import Systems
from lrp_prune.pruning.compensation.ways import Compensation
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.places import Place

FEWEST = 16
"""Rows that a layer has to get to be compensated."""


def update_(
    place: Place, systems: Systems, parameters: Mapping[str, nn.Parameter], before: Mapping[str, Tensor], masks: Masks,
    way: Compensation,
) -> tuple[float, float] | str:  # fmt: skip
    """Update what is kept of a layer, in place.

    Args:
        place: the layer.
        systems: sums of products of its inputs.
        parameters: of the model, by name.
        before: the dense values of those of the layer's stage.
        masks: what is pruned.
        way: how.

    Returns:
        The squared error of outputs that the mask adds to the least squares without one, before and after; or why it is left out.

    Raises:
        FloatingPointError: the inputs are not finite.
    """
    if not systems.known or systems.gram is None:
        return "is in no product whose inputs can be laid out as rows"
    if systems.count < FEWEST:
        return f"is reached by fewer than {FEWEST} samples or tokens"
    weight = Matrix(place, parameters, masks, len(systems.gram))
    found = weight.values({**parameters, **before})  # a bias may be another module's
    gram, crossed = systems.gram.to(found.dtype), systems.crossed
    if not bool(torch.isfinite(gram).all()):
        raise FloatingPointError(f"the inputs of {place.name} are not finite: check the batches and the precision")
    share = way.dense if systems.paired and crossed is not None else 0.0
    mixed = gram if crossed is None or share == 0 else gram.lerp(crossed.to(found.dtype), share)
    if not weight.has_bias:
        gram, mixed = gram[:, :-1, :-1], mixed[:, :-1, :-1]
    solved, errors = [], [0.0, 0.0]
    for group in range(len(gram)):
        own, kept, dense = gram[group].diagonal(), weight.kept[group], found[group]
        inputs = own[:-1] if weight.has_bias else own
        damping = way.damping * float(inputs.mean())
        if damping == 0:  # nothing ever comes in
            solved.append(dense * kept)
            continue
        damped = gram[group] + torch.eye(len(own), dtype=gram.dtype, device=gram.device) * damping
        cross = dense @ mixed[group] + damping * dense
        update = way.solve(damped, cross, kept, dense)
        best = torch.cholesky_solve(cross.T, torch.linalg.cholesky(damped)).T
        errors = [
            total + _distance(entry, best, damped) for total, entry in zip(errors, (dense * kept, update), strict=True)
        ]
        solved.append(update)
    weight.write_(torch.stack(solved))
    return errors[0], errors[1]


def _distance(weight: Tensor, best: Tensor, gram: Tensor) -> float:
    """The squared error of outputs beyond that of the least squares without a mask."""
    apart = weight - best
    return float(((apart @ gram) * apart).sum())
