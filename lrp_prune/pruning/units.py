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
            mask = existing.local(member.parameter).movedim(member.dim, 0)
            indices = torch.zeros(size, dtype=torch.bool)
            here, owned = _indices_here(relevance, member, size)
            indices[owned] = mask[here].unsqueeze(-1).flatten(1).any(dim=1)
            sharding = relevance.shardings.get(member.parameter)
            if sharding is not None:
                indices = sharding.all_reduced(indices.to(torch.uint8), "MAX").to(torch.bool)
            alive |= indices.reshape(number, -1).any(dim=1)
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
        sharding = relevance.shardings.get(name)
        shape = shapes[name] if sharding is None else sharding.local_shape
        mask = (
            existing.local(name) if existing is not None and name in existing else torch.ones(shape, dtype=torch.bool)
        )
        for member, size, alive in owned:
            here, there = _indices_here(relevance, member, size)
            pruned = (~alive).repeat_interleave(member.width)[there].nonzero().view(-1)
            mask.narrow(member.dim, here.start, here.stop - here.start).index_fill_(member.dim, pruned, False)
        masks[name] = bits.pack(mask)
    return shapes, masks


def _indices_here(relevance: "Relevance", member: "Member", size: int) -> tuple[slice, slice]:
    """Of a member's first ``size`` indices those that this process has: where they are here, and which they are."""
    sharding = relevance.shardings.get(member.parameter)
    if sharding is None or sharding.dim != member.dim:
        return slice(0, size), slice(0, size)
    start, stop = (min(bound, size) for bound in sharding.bounds)
    return slice(0, stop - start), slice(start, stop)


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
