"""Solving for one layer, and writing what comes out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lrp_prune.pruning.compensation.damping import damping_of
from lrp_prune.pruning.compensation.matrices import Matrix
from lrp_prune.pruning.compensation.systems import Systems
from lrp_prune.pruning.compensation.ways import Compensation
from lrp_prune.pruning.compensation.wholes import Whole
from lrp_prune.pruning.places import Place
from lrp_prune.pruning.processes import Processes

FEWEST = 16
"""Rows that a layer has to get to be compensated."""
_LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch does not list it
_SINGULAR = 0.01
"""What may be left of a system when it is solved, as a share: beyond, rounding has made it another one."""


@dataclass(frozen=True)
class Solved:
    """What one process has solved for: some rows of a layer, and nothing elsewhere.

    Args:
        weight: the layer.
        rows: ``[groups, out, in]``, zero where others solve.
        errors: the squared error of outputs that the mask adds to the least squares without one, before and after.
        damping: as a fraction of the mean square of the inputs.
        raised: by what the damping had to be multiplied; infinite if nothing was enough, and rows are as the mask made them.
    """

    weight: Matrix
    rows: Tensor
    errors: tuple[float, float]
    damping: float
    raised: float

    def write_(self, processes: Processes) -> tuple[float, float, float]:
        """Write the rows of all processes, the same in each; the errors of all rows, and by what damping was raised."""
        self.weight.write_(processes.summed(self.rows))
        before, after, raised = zip(*processes.gathered((*self.errors, self.raised)), strict=True)
        return sum(before), sum(after), max(raised)


def solved_for(
    place: Place, systems: Systems, wholes: Mapping[str, Whole], way: Compensation, processes: Processes
) -> Solved | str:
    """What is kept of a layer: each row has a system of its own, so that processes have some rows each.

    Args:
        place: the layer.
        systems: sums of products of its inputs.
        wholes: its weight and its bias.
        way: how.
        processes: those that solve for it together.

    Returns:
        The rows; or why it is left out, which all processes say alike.

    Raises:
        FloatingPointError: the inputs are not finite.
    """
    if not systems.known or systems.gram is None:
        return "is in no product whose inputs can be laid out as rows"
    if systems.count < FEWEST:
        return f"is reached by fewer than {FEWEST} samples or tokens"
    weight = Matrix(place, wholes, len(systems.gram))
    found = weight.dense
    gram, crossed = systems.gram.to(found.dtype), systems.crossed
    if not bool(torch.isfinite(gram).all()):
        raise FloatingPointError(f"the inputs of {place.name} are not finite: check the batches and the precision")
    share = way.dense if systems.paired and crossed is not None else 0.0
    mixed = gram if crossed is None or share == 0 else gram.lerp(crossed.to(found.dtype), share)
    if not weight.has_bias:
        gram, mixed = gram[:, :-1, :-1], mixed[:, :-1, :-1]
    damping = damping_of(way.damping, systems, weight, gram)
    rows, errors, own, raised = torch.zeros_like(found), [0.0, 0.0], processes.share(found.shape[1]), 1.0
    for group in range(len(gram)):
        inputs, kept, dense = gram[group].diagonal(), weight.kept[group, own], found[group, own]
        size = float((inputs[:-1] if weight.has_bias else inputs).mean())
        if not len(kept):  # others solve
            continue
        if size == 0:  # nothing ever comes in, and a bias gives what it gives alone
            rows[group, own] = dense * kept
            if weight.has_bias:
                alone = (dense @ mixed[group])[:, -1] / inputs[-1]
                apart = (rows[group, own, -1] - alone).square() * inputs[-1]
                rows[group, own, -1] = torch.where(kept[:, -1], alone, 0.0)
                left = apart * ~kept[:, -1]
                errors = [errors[0] + float(apart.sum()), errors[1] + float(left.sum())]
            continue
        update, before, after, times = _solved(gram[group], mixed[group], kept, dense, way, size * damping)
        rows[group, own], raised = update, max(raised, times)
        errors = [errors[0] + before, errors[1] + after]
    return Solved(weight, rows, (errors[0], errors[1]), damping, raised)


def _solved(
    gram: Tensor, mixed: Tensor, kept: Tensor, dense: Tensor, way: Compensation, least: float
) -> tuple[Tensor, float, float, float]:
    """Rows, their errors before and after, and by what the damping was raised, as rounding made the system singular without.

    Args:
        gram: ``[in, in]``, not damped.
        mixed: products of the inputs that targets are made of with those of the layer.
        kept: boolean ``[out, in]``.
        dense: weights ``[out, in]``.
        way: how.
        least: the damping, if nothing is lost in rounding.
    """
    times, masked = 1.0, dense * kept
    size = float(gram.diagonal().mean())
    while True:
        damping = times * least
        damped = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * damping
        cross = dense @ mixed + damping * dense
        try:
            best = torch.cholesky_solve(cross.T, torch.linalg.cholesky(damped)).T
            made = best @ damped
            if not bool((made - cross).norm() <= _SINGULAR * cross.norm()):
                raise _LinAlgError("the least squares are lost in rounding")
            update = way.solve(damped, cross, kept, dense)
            before, after = _distance(masked, best, damped), _distance(update, best, damped)
            if not after <= before + _SINGULAR * float((made * best).sum()):
                raise _LinAlgError("the update is worse than the mask alone")
        except _LinAlgError:
            if damping > max(size, least):  # that is no rounding any more
                return masked, 0.0, 0.0, math.inf
            times *= 10
            continue
        return update, before, after, times


def _distance(weight: Tensor, best: Tensor, gram: Tensor) -> float:
    """The squared error of outputs beyond that of the least squares without a mask."""
    apart = weight - best
    return float(((apart @ gram) * apart).sum())
