"""Less from the blocks whose loss is felt most at the outputs: pruned one at a time, and measured."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from lrp_prune.engine.uses import WeightUses
from lrp_prune.models.batches import check_batches, to_device
from lrp_prune.models.padding import counted_tokens
from lrp_prune.models.subject import subject_of
from lrp_prune.progress import bar, no_bar
from lrp_prune.pruning.budgets.budget import MOST, Budget, check_budgeted, of_groups
from lrp_prune.pruning.budgets.scores import scored_groups
from lrp_prune.pruning.choices import Choices
from lrp_prune.pruning.compared import asked_of, comparing_by
from lrp_prune.pruning.methods import Method, method_of
from lrp_prune.pruning.passes import distances, outputs_of
from lrp_prune.pruning.processes import Processes
from lrp_prune.pruning.scope import Scope, scope_of
from lrp_prune.pruning.select import select
from lrp_prune.pruning.zeroed import zeroed
from lrp_prune.relevance import Relevance
from lrp_prune.selection.scopes import Structure, parse_scope


def measured(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity: float = 0.5,
    *,
    method: str | Method = "lrp",
    scope: str | Scope = "layer",
    spread: float = 0.2,
    levels: int = 5,
    by: str = "block",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    relevance: Relevance | None = None,
    progress: bool = True,
) -> Budget:
    r"""From measured sensitivity: each block is pruned alone, to several shares, and outputs are compared with the dense ones.

    With the distance :math:`d_g(s)` of block :math:`g` pruned to :math:`s` (the Kullback-Leibler divergence of choices, else
    squares, as :func:`~lrp_prune.pruning.recalibrate` has it), linear between the shares that were tried and made convex, the
    budget minimises :math:`\sum_g d_g(s_g)` with :math:`\sum_g n_g s_g = S \sum_g n_g`: what is pruned next is what costs least
    for each weight. It takes ``levels`` forward passes over the batches for each block; the model comes out as it went in.

    Args:
        model: as for :func:`lrp_prune.prune`.
        batches: reference samples, gone through many times: a few batches do. What the dense model gives to all is kept.
        sparsity: :math:`S`, of all.
        method: by which each block is pruned.
        scope: what is compared within a tensor, see :func:`lrp_prune.select`.
        spread: shares from ``sparsity - spread`` to ``sparsity + spread`` are considered.
        levels: how many of them are tried, evenly.
        by: ``"block"`` (a module that repeats; a layer where none does), or ``"tensor"``.
        include, exclude: which weights, see :func:`lrp_prune.attribute`.
        relevance: scores of this model, in place of collecting them.
        progress: show a progress bar.

    Raises:
        ValueError: for an argument out of range, a divided model, outputs that cannot be compared, and what scoring raises.

    Example:
        >>> import torch, lrp_prune
        >>> from lrp_prune.pruning import budgets
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> batches = [(torch.randn(64, 16), torch.randint(4, (64,)))]
        >>> round(budgets.measured(model, batches, 0.5, progress=False).sparsity, 6)
        0.5
    """
    check_budgeted(sparsity)
    if isinstance(spread, bool) or not isinstance(spread, int | float) or not 0 < spread < 1:
        raise ValueError(f"spread must be a number in (0, 1), got {spread!r}")
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
        raise ValueError(f"levels must be an integer of at least 2, got {levels!r}")
    if isinstance(parse_scope(scope_of(scope).compared or "global"), Structure):
        raise ValueError(
            f"scope {scope!r} has no shares between: take 'row' or 'layer', and round the budget by in_steps"
        )
    check_batches(batches)
    batches, method = list(batches), method_of(method)
    if not batches:
        raise ValueError("a measured budget needs batches: pass some")
    relevance, groups = scored_groups(model, batches, method, by, include, exclude, relevance, progress)
    sizes = {name: relevance[name].numel() for group in groups for name in group}
    low, high = max(sparsity - spread, 0.0), min(sparsity + spread, MOST)
    tried = [low + (high - low) * number / (levels - 1) for number in range(levels)]
    comparison = _Comparison(model, batches, asked_of(method.target, relevance.target))
    curves = []
    with (bar if progress else no_bar)("Measuring", len(groups) * len(tried)) as advance:
        for group in groups:
            curve = []
            for level in tried:
                masks = select(relevance, dict.fromkeys(group, level), scope) if level else None
                if masks is None:
                    curve.append(0.0)
                else:
                    with zeroed(subject_of(model).module, masks):
                        curve.append(comparison.distance())
                advance(1)
            curves.append(curve)
    entries = [sum(sizes[name] for name in group) for group in groups]
    shares = cheapest(tried, curves, entries, sparsity)
    return of_groups(groups, shares, sizes, sparsity)


class _Comparison:
    """How far a model's outputs on some batches are from what they were at first."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], target: Any) -> None:
        subject = subject_of(model)
        self._module, self._batches = subject.module, batches
        self._device = next(self._module.parameters()).device
        own = subject.own_target
        target = own if own is not None and not callable(target) else target
        self._target = comparing_by(self._module, batches[0], target, Processes(None), None, self._device)
        self._dense = [self._outputs(batch) for batch in batches]

    def _outputs(self, batch: Any) -> list[Tensor]:
        batch = to_device(batch, self._device)
        return outputs_of(self._module, batch, WeightUses(), self._target, Choices())

    def distance(self) -> float:
        """The mean over batches of what the model is from its first outputs now."""
        total = 0.0
        for batch, dense in zip(self._batches, self._dense, strict=True):
            counted = counted_tokens(self._module, batch, 0)
            found = distances(dense, self._outputs(batch), self._target, counted)
            compared = [distance for distance in found if distance is not None]
            if not compared:
                raise ValueError(
                    "no output can be compared, since shapes depend on values: pass a method with a function as its target, "
                    "whose values are compared then"
                )
            total += sum(compared)
        if not math.isfinite(total):
            raise ValueError(
                "outputs of the model, as it is or pruned, are not finite: measure in a wider type (model.float()), or with a "
                "smaller spread"
            )
        return total / len(self._batches)


def cheapest(
    levels: Sequence[float], curves: Sequence[Sequence[float]], sizes: Sequence[int], sparsity: float
) -> list[float]:
    """Shares of least cost: from the lowest level on, what costs least for each entry is pruned next; what costs alike, alike.

    Args:
        levels: shares that were tried, rising.
        curves: of each group the cost at each level, which is made convex, and no less than at a lower level.
        sizes: entries of each group.
        sparsity: of all.

    Example:
        >>> cheapest([0.25, 0.5, 0.75], [[0.0, 1.0, 4.0], [0.0, 2.0, 8.0]], [10, 10], 0.5)
        [0.5, 0.5]
        >>> cheapest([0.25, 0.5, 0.75], [[0.0, 1.0, 1.5], [0.0, 2.0, 8.0]], [10, 10], 0.5)
        [0.75, 0.25]
        >>> cheapest([0.25, 0.75], [[0.0, 0.0], [0.0, 0.0]], [10, 30], 0.5)
        [0.5, 0.5]
    """
    shares = [levels[0]] * len(sizes)
    left = (sparsity - levels[0]) * sum(sizes)
    steps = [
        (_slope(first, second) / sizes[index], index, (second[0] - first[0]) * sizes[index])
        for index, curve in enumerate(curves)
        for first, second in pairwise(_convex(levels, curve))
    ]
    while steps and left > 1e-9:
        least = min(slope for slope, _, _ in steps)
        alike = [step for step in steps if math.isclose(step[0], least)]
        steps = [step for step in steps if step not in alike]
        room = sum(entries for _, _, entries in alike)
        part = min(left / room, 1.0)
        for _, index, entries in alike:
            shares[index] += part * entries / sizes[index]
        left -= part * room
    return [round(share, 12) for share in shares]


def _convex(levels: Sequence[float], costs: Sequence[float]) -> list[tuple[float, float]]:
    """The points of the lower convex hull of costs that never fall."""
    rising = [max(costs[: index + 1]) for index in range(len(costs))]
    hull: list[tuple[float, float]] = []
    for x, y in zip(levels, rising, strict=True):
        while len(hull) > 1 and (y - hull[-1][1]) * (hull[-1][0] - hull[-2][0]) <= (hull[-1][1] - hull[-2][1]) * (
            x - hull[-1][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull


def _slope(first: tuple[float, float], second: tuple[float, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])
