"""Units and the parameter entries they own: neurons, heads and blocks, as masks of parameters."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrp_prune.pruning import bits
from lrp_prune.pruning.masks import Masks

if TYPE_CHECKING:
    from lrp_prune.relevance import Member, Relevance


def existing_units(
    relevance: "Relevance", units: Mapping[str, tuple[int, ...]], existing: Masks | None
) -> dict[str, Tensor]:
    """Packed per group: which units are not pruned yet; one is pruned when ``existing`` prunes all that it owns."""
    if existing is None:
        return {}
    result = {}
    for name, (number,) in units.items():
        alive = torch.zeros(number, dtype=torch.bool)
        for member, size in _members(relevance, name, number):
            if member.parameter not in existing:
                alive.fill_(True)
                continue
            mask = existing[member.parameter].movedim(member.dim, 0)[:size]
            alive |= mask.reshape(number, -1).any(dim=1)
        result[name] = bits.pack(alive)
    return result


def expand_units(
    relevance: "Relevance", chosen: Mapping[str, Tensor], existing: Masks | None
) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
    """Shapes and packed masks of all parameters that the groups' units own entries of; ``existing`` joins in."""
    parameters: dict[str, list[tuple[Member, int, Tensor]]] = {}
    for name, packed in chosen.items():
        number = relevance[name].numel()
        alive = bits.unpack(packed, (number,))
        for member, size in _members(relevance, name, number):
            parameters.setdefault(member.parameter, []).append((member, size, alive))
    shapes = {name: tuple(relevance.parameter_shapes[name]) for name in parameters}
    masks = {}
    for name, owned in parameters.items():
        mask = (
            existing[name] if existing is not None and name in existing else torch.ones(shapes[name], dtype=torch.bool)
        )
        for member, size, alive in owned:
            pruned = (~alive).repeat_interleave(member.width).nonzero().view(-1)
            mask.narrow(member.dim, 0, size).index_fill_(member.dim, pruned, False)
        masks[name] = bits.pack(mask)
    return shapes, masks


def _members(relevance: "Relevance", name: str, number: int) -> Iterator[tuple["Member", int]]:
    """A group's members with the indices that its units own along their dimension."""
    if not relevance.members.get(name):
        raise ValueError(
            f"the relevance does not say which parameters the {relevance.granularity}s of {name} own (members)"
        )
    for member in relevance.members[name]:
        shape = relevance.parameter_shapes.get(member.parameter)
        if shape is None:
            raise ValueError(
                f"the relevance does not give the shape of {member.parameter}, which {name} owns entries of"
            )
        size = number * member.width
        if size > shape[member.dim]:
            raise ValueError(
                f"{number} {relevance.granularity}s of {member.width} in {name} need {size} indices along dimension "
                f"{member.dim} of {member.parameter}, which has shape {tuple(shape)}"
            )
        yield member, size
