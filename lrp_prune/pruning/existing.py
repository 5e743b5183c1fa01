"""Whether masks of earlier rounds leave anything to a sparsity, as far as this shows without scores."""

import math
from collections.abc import Mapping

from torch import Tensor

from lrp_prune.pruning.masks import Masks
from lrp_prune.relevance.unscored import patterns_of
from lrp_prune.selection.scopes import Structure, as_rows, groups_by_pattern, number_to_prune, parse_scope


def check_existing(
    existing: Masks,
    layouts: Mapping[str, str | None],
    shapes: Mapping[str, tuple[int, ...]],
    sparsity: float | Mapping[str, float],
    scope: str,
) -> None:
    """Refuse what :func:`~lrp_prune.pruning.select` would refuse whatever the scores are, as too much is pruned already.

    Args:
        existing: masks of earlier rounds.
        layouts: of each weight, None where it is not known: then its rows are not looked at.
        shapes: of these weights.
        sparsity: what is to be pruned, in all or by pattern of names.
        scope: what is compared with what.

    Raises:
        ValueError: and says where.

    Example:
        >>> import torch
        >>> existing = Masks({"weight": torch.tensor([[True, False, False, False]])})
        >>> check_existing(existing, {"weight": "linear"}, {"weight": (1, 4)}, 0.5, "global")
        Traceback (most recent call last):
        ...
        ValueError: 3 of 4 entries of weight are pruned already, more than the 2 asked for: sparsity is total, ...
    """
    parsed = parse_scope(scope)
    for _, names, rate in groups_by_pattern(list(shapes), sparsity):
        for together in [names] if parsed == "global" else [[name] for name in names]:
            entries = sum(math.prod(shapes[name]) for name in together)
            pruned, k = sum(existing.pruned_in(name) for name in together if name in existing), entries
            if parsed in ("global", "layer"):
                k = number_to_prune(rate, entries)
            elif together[0] in existing and not existing.sharding(together[0]).is_divided:
                pruned, k, entries = _fullest_row(
                    existing[together[0]], layouts[together[0]], parsed, rate, together[0]
                )
            if pruned > k:
                where = "" if parsed in ("global", "layer") else "a row of "
                raise ValueError(
                    f"{pruned} of {entries} entries of {where}{', '.join(patterns_of(together))} are pruned already, more than "
                    f"the {k} asked for: sparsity is total, ask for at least as much, or leave out the existing masks (of a "
                    "checkpoint: begin without ckpt_path, from its weights)"
                )


def _fullest_row(
    mask: Tensor, layout: str | None, scope: str | Structure, rate: float, name: str
) -> tuple[int, int, int]:
    """How many entries of a row are pruned at most, how many are to be, and how many there are."""
    if layout is None:
        return 0, 0, 0
    view = as_rows(mask, layout, scope, name)
    length = scope.size if isinstance(scope, Structure) else math.prod(view.shape[2:])
    k = scope.pruned(rate) if isinstance(scope, Structure) else number_to_prune(rate, length)
    return int((~view).reshape(-1, length).sum(1).max()), k, length
