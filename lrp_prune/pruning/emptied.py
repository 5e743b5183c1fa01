"""Layers that a mask leaves next to nothing of, outputs and inputs that it cuts off, and how this is said."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from lrp_prune.pruning.kinds import by_kind
from lrp_prune.relevance.unscored import patterns_of
from lrp_prune.selection.scopes import as_rows, layout_of, number_to_prune

if TYPE_CHECKING:
    from lrp_prune.pruning.coverage import Group
    from lrp_prune.pruning.masks import Masks
    from lrp_prune.relevance import Relevance

NEARLY_ALL = 0.95
"""A tensor that loses more than this share is told, unless as much was asked for."""
_SHOWN = 6


class EmptiedWeightsWarning(UserWarning):
    """Tensors lose all or nearly all of their weights, where less was asked for of all together."""


class CutOff(NamedTuple):
    """What of a layer no weight is left of.

    Args:
        outputs: that no input reaches.
        all_outputs: of the layer.
        inputs: that reach no output.
        all_inputs: of the layer.
    """

    outputs: int
    all_outputs: int
    inputs: int
    all_inputs: int


def cut_off(kept: Tensor, layout: str | None = None) -> CutOff | None:
    """Count the outputs and inputs of a layer that have no weight left; None where a tensor has none (a vector).

    Args:
        kept: the mask of a weight, True for what is kept.
        layout: one of :data:`lrp_prune.selection.scopes.LAYOUTS`; None for what the shape suggests.

    Example:
        >>> import torch
        >>> cut_off(torch.tensor([[True, False, True], [False, False, False]]))
        CutOff(outputs=1, all_outputs=2, inputs=1, all_inputs=3)
    """
    layout = layout or layout_of(tuple(kept.shape))
    if kept.dim() < 2 or layout == "vector":
        return None
    rows, columns = (as_rows(kept, layout, scope, "a mask").flatten(2).any(2) for scope in ("row", "column"))
    return CutOff(int((~rows).sum()), rows.numel(), int((~columns).sum()), columns.numel())


def emptied(masks: "Masks") -> list[str]:
    """Names of the tensors that lose more than :data:`NEARLY_ALL`, those that lose most first."""
    found = [name for name in masks if masks.sparsity_of(name) > NEARLY_ALL]
    return sorted(found, key=masks.sparsity_of, reverse=True)


def in_words(masks: "Masks", names: Iterable[str]) -> str:
    """Tensors by kind of layer, each with what is lost: ``"layers.*.q.weight (2 tensors, up to 99.1 %)"``."""
    parts = []
    for members in by_kind(names).values():
        most = f"{100 * max(map(masks.sparsity_of, members)):.1f} %"
        several = f"{len(members)} tensors, up to " if len(members) > 1 else ""
        parts.append(f"{patterns_of(members)[0]} ({several}{most})")
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return ", ".join(parts[:_SHOWN]) + more


def tell_emptied(groups: Sequence["Group"], masks: "Masks", existing: "Masks | None", scope: str) -> None:
    """Warn, once a selection, of tensors that lose far more than was asked for, and were not that empty before."""
    if masks.granularity in (
        "block",
        "embedding",
    ):  # a block is a whole tensor, and rows of embeddings are not read together
        return
    rates = {name: group.rate for group in groups for name in group.scored}
    whole = masks.granularity == "weight"
    most = max(rates.values())
    names = [
        name
        for name in emptied(masks)
        if (name in rates or not whole)
        and (whole or len(masks.shapes[name]) > 1)
        and (rates.get(name, most) < NEARLY_ALL or masks.pruned_in(name) == math.prod(masks.shapes[name]))
        and not (existing is not None and name in existing and existing.sparsity_of(name) > NEARLY_ALL)
    ]
    if not names:
        return
    gone = sum(masks.pruned_in(name) == math.prod(masks.shapes[name]) for name in names)
    all_of_them = f", {gone} of them all" if gone else ""
    floor = "raise the floor (Scope(floor=1.0) prunes each tensor alike), " if whole and scope == "global" else ""
    warnings.warn(
        f"{len(names)} of {len(masks)} tensors lose more than {100 * NEARLY_ALL:.0f} % of their weights{all_of_them}, where "
        f"{100 * most:g} % was asked for of all together: {in_words(masks, names)}. With so little left a layer computes next "
        f"to nothing: {floor}leave them out by exclude={patterns_of(names)!r}, or use scope='layer'",
        EmptiedWeightsWarning,
        stacklevel=3,
    )


def tell_rounded_away(
    relevance: "Relevance", groups: "Iterable[Group]", sizes: Mapping[str, int], together: bool
) -> None:
    """Say where a sparsity of units is less than half of one, so that none of them is pruned.

    Args:
        relevance: of units.
        groups: what is selected from together.
        sizes: how many units each tensor has, or of several layers each.
        together: whether all of a group are compared, or each tensor by itself.
    """
    kinds = {name: kind for kind, names in relevance.kinds().items() for name in names}
    for group in groups:
        by_size: dict[int, list[str]] = {}
        for name in group.scored:
            number = sum(sizes[other] for other in group.scored) if together else sizes[name]
            by_size.setdefault(number, []).append(name)
        for number, names in by_size.items():
            if group.rate > 0 and number_to_prune(group.rate, number) == 0:
                where = "" if together else " in each"
                warnings.warn(
                    f"sparsity {group.rate:g} of {number} {kinds[names[0]]}s{where} of {', '.join(patterns_of(names)[:_SHOWN])} "
                    f"is less than half of one, so that none of them is pruned: the least is one, sparsity={1 / number:.4g}",
                    stacklevel=4,
                )
