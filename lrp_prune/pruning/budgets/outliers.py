"""Less from the blocks that have more outliers."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lrp_prune.pruning.budgets.budget import Budget, of_groups, spread_around
from lrp_prune.pruning.budgets.scores import scored_groups
from lrp_prune.pruning.methods import Method
from lrp_prune.relevance import Relevance


def outlier_weighted(
    model: nn.Module,
    batches: Iterable[Any] = (),
    sparsity: float = 0.5,
    *,
    method: str | Method = "wanda",
    threshold: float = 5.0,
    spread: float = 0.08,
    by: str = "block",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    relevance: Relevance | None = None,
    progress: bool = True,
) -> Budget:
    r"""Outlier-weighted layerwise sparsity (OWL, arXiv 2310.05175): blocks with more outliers keep more.

    The share of outliers of a block is :math:`D = |\{A_{ij} > M \bar A\}| / n` of its scores :math:`A`, and its density grows
    linearly with it, from :math:`1 - S - \lambda` to :math:`1 - S + \lambda`, moved so that all together have :math:`1 - S`.

    Args:
        model: as for :func:`lrp_prune.prune`.
        batches: reference samples.
        sparsity: :math:`S`, of all.
        method: whose scores: ``"wanda"`` as in the paper, or any other.
        threshold: :math:`M`: as many times the block's mean is an outlier.
        spread: :math:`\lambda`.
        by: ``"block"`` (a module that repeats; a layer where none does), or ``"tensor"``.
        include, exclude: which weights, see :func:`lrp_prune.attribute`.
        relevance: scores of this model, in place of collecting them.
        progress: show a progress bar.

    Raises:
        ValueError: for an argument out of range, a divided model, and what scoring raises.

    Example:
        >>> import torch, lrp_prune
        >>> from lrp_prune.pruning import budgets
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> batches = [(torch.randn(64, 16), torch.randint(4, (64,)))]
        >>> budget = budgets.outlier_weighted(model, batches, 0.5, threshold=2.0, spread=0.1, progress=False)
        >>> round(budget.sparsity, 6)
        0.5
        >>> lrp_prune.prune(model, batches, budget, "wanda", "layer", progress=False).sparsity
        0.5
    """
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not threshold > 1:
        raise ValueError(f"threshold says how many times the mean an outlier is, more than 1, got {threshold!r}")
    relevance, groups = scored_groups(model, batches, method, by, include, exclude, relevance, progress)
    sizes = {name: relevance[name].numel() for group in groups for name in group}
    outliers, entries = [], []
    for group in groups:
        number = sum(sizes[name] for name in group)
        mean = sum(float(relevance[name].abs().double().sum()) for name in group) / number
        outliers.append(sum(int((relevance[name].abs() > threshold * mean).sum()) for name in group) / number)
        entries.append(number)
    shares = spread_around([-share for share in outliers], entries, sparsity, spread)
    return of_groups(groups, shares, sizes, sparsity)
