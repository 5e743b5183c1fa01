"""Units and the parameter entries they own: neurons, heads and blocks, as masks of parameters."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lrp_prune.distributed.sharding import local_part, sharding_of
from lrp_prune.names import named_parameters
from lrp_prune.pruning.masks import Masks
from lrp_prune.relevance.members import Member
from lrp_prune.selection import bits

if TYPE_CHECKING:
    from lrp_prune.relevance import Relevance


def existing_units(
    relevance: "Relevance", units: Mapping[str, tuple[int, ...]], existing: Masks | None
) -> dict[str, Tensor]:
    """Packed per group: which units are not pruned yet; one is pruned when ``existing`` prunes all that it owns."""
    if existing is None:
        return {}
    result = {}
    for name, (number,) in units.items():
        alive = torch.zeros(number, dtype=torch.bool, device="cpu")
        for member in _members(relevance, name):
            if member.parameter not in existing:
                alive.fill_(True)
                continue
            mask, sharding = existing.local(member.parameter), relevance.sharding_of(member.parameter)
            here = Member(member.parameter, sharding.part(member.owners)).any_kept(mask, number)
            alive |= sharding.all_reduced(here.to(torch.uint8), "MAX").to(torch.bool)
        result[name] = bits.pack(alive)
    return result


def expand_units(
    relevance: "Relevance", chosen: Mapping[str, Tensor], existing: Masks | None
) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
    """Shapes and packed masks of all parameters that the groups' units own entries of; ``existing`` joins in."""
    parameters: dict[str, list[tuple[Member, Tensor]]] = {}
    for name, packed in chosen.items():
        alive = bits.unpack(packed, (relevance[name].numel(),))
        for member in _members(relevance, name):
            parameters.setdefault(member.parameter, []).append((member, alive))
    shapes = {name: tuple(relevance.parameter_shapes[name]) for name in parameters}
    masks = {}
    for name, owned in parameters.items():
        sharding = relevance.sharding_of(name)
        mask = (
            existing.local(name)
            if existing is not None and name in existing
            else torch.ones(sharding.local_shape, dtype=torch.bool, device="cpu")
        )
        for member, alive in owned:
            mask &= sharding.part(member.kept(alive))
        masks[name] = bits.pack(mask)
    return shapes, masks


def weight_norms(model: nn.Module, members: Iterable[Member], units: int) -> Tensor:
    """The root mean square of all weights that each unit owns: float32 ``[units]``."""
    parameters = named_parameters(model)
    squares, counts = (
        torch.zeros(units + 1, dtype=torch.float64, device="cpu"),
        torch.zeros(units + 1, dtype=torch.float64, device="cpu"),
    )
    for member in members:
        parameter = parameters[member.parameter]
        sharding, here = sharding_of(parameter, member.parameter), local_part(parameter)
        owners = sharding.part(member.owners).long().remainder(units + 1)  # those of nobody are the last
        shared = [axis for axis, size in enumerate(owners.shape) if size == 1]
        own = here.to(torch.float32).square().sum(shared, keepdim=True) if shared else here.to(torch.float32).square()
        found = torch.zeros(units + 1, dtype=torch.float64, device="cpu")
        found.index_add_(0, owners.reshape(-1), own.cpu().double().reshape(-1))
        squares += sharding.all_reduced(found)
        repeats = math.prod(size for axis, size in enumerate(parameter.shape) if member.owners.shape[axis] == 1)
        all_owners = member.owners.reshape(-1).long().remainder(units + 1)
        counts.index_add_(0, all_owners, torch.full((len(all_owners),), repeats, device="cpu").double())
    return (squares[:units] / counts[:units].clamp(min=1)).sqrt().float()


def _members(relevance: "Relevance", name: str) -> Iterator[Member]:
    """A group's members, each of which fits the shape of its parameter."""
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
        owners = tuple(member.owners.shape)
        if len(owners) != len(shape) or any(mine not in (1, size) for mine, size in zip(owners, shape, strict=True)):
            raise ValueError(
                f"the owners of {member.parameter} in {name} have shape {owners}, which does not fit its shape {tuple(shape)}"
            )
        if int(member.owners.max()) >= relevance[name].numel():
            raise ValueError(
                f"{member.parameter} has entries of unit {int(member.owners.max())} of {name}, which has "
                f"{relevance[name].numel()} {relevance.granularity}s"
            )
        yield member
