"""The scores that a budget is made from: given or collected, in groups; what has none is named."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lrp_prune.models.batches import check_batches
from lrp_prune.progress import Counted, bar, no_bar, number_of
from lrp_prune.pruning.budgets.budget import check_whole, groups_by
from lrp_prune.pruning.coverage import refuse_unusable
from lrp_prune.pruning.methods import Method
from lrp_prune.pruning.scorers import scorer
from lrp_prune.relevance import Relevance
from lrp_prune.relevance.unscored import (
    UnscoredWeightsWarning,
    check_included,
    described,
    entries_of,
    patterns_of,
    share,
)


def scored_groups(
    model: nn.Module,
    batches: Iterable[Any],
    method: str | Method,
    by: str,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    relevance: Relevance | None,
    progress: bool,
) -> tuple[Relevance, list[list[str]]]:
    """Scores of single weights, and which tensors share one number; a warning names what has no scores.

    Args:
        model, batches, method, include, exclude, progress: as for :func:`lrp_prune.prune`.
        by: see :func:`groups_by`.
        relevance: in place of collecting it.

    Raises:
        ValueError: for relevance of units, weights that cannot be pruned, and what scoring and :func:`groups_by` raise.
    """
    check_whole(model)
    if relevance is None:
        check_batches(batches)
        scores = scorer(method, model, include=include, exclude=exclude)
        with (bar if progress else no_bar)("Collecting scores", number_of(batches)) as advance:
            scores.collect(Counted(batches, advance))
        relevance = scores.compute()
        check_included(include, relevance, relevance.unscored)
    elif relevance.granularity != "weight":
        raise ValueError(f"a budget is of weights, and the relevance is about {relevance.granularity}s")
    missing = relevance.unscored
    refuse_unusable(missing)
    names = [name for name in relevance if name not in missing]
    groups = groups_by(model, names, by)
    if missing:
        shapes = relevance.parameter_shapes
        number = entries_of(missing, shapes)
        warnings.warn(
            f"{share(number, number + entries_of(names, shapes))} are not scored, so that they are not in the budget and stay "
            f"dense: {described(missing)}. The budget's sparsity is of the others; exclude={patterns_of(missing)!r} says so "
            "beforehand",
            UnscoredWeightsWarning,
            stacklevel=3,
        )
    return relevance, groups
