"""The units of a model that could be taken out, and which of them masks leave nothing of."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrp_prune.attribution.collect import attribute
from lrp_prune.attribution.observers import NothingScoredError
from lrp_prune.pruning.checking import explaining_nothing
from lrp_prune.relevance.members import Member

KINDS = ("head", "neuron")


class Group(NamedTuple):
    """Units that the same layers make and read.

    Args:
        name: of the layer that reads them.
        kind: one of :data:`KINDS`; the filters of a convolution are neurons.
        members: the entries of parameters that they own.
        dead: bool ``[units]``, nothing of which is kept.
    """

    name: str
    kind: str
    members: tuple[Member, ...]
    dead: Tensor


def groups_of(
    module: nn.Module, batch: Any, run: Callable[[nn.Module, Any], Any], kept: Callable[[str], Tensor | None]
) -> list[Group]:
    """All groups of neurons and heads, found in one forward.

    Args:
        module: what is run.
        batch: one batch.
        run: how it is run.
        kept: the mask of a parameter; None: all of it is kept.
    """
    found: dict[str, tuple[str, tuple[Member, ...], int]] = {}
    options: dict[str, Any] = {"composite": "gradient", "statistic": "structure", "unruled": "ignore"}
    with warnings.catch_warnings():
        # What has no units is no news here: masks of units were made by a trace like this.
        warnings.simplefilter("ignore")
        try:
            relevance = attribute(
                module,
                [batch],
                target=explaining_nothing(module, run),
                granularity=list(KINDS),
                include=["*"],
                **options,
            )
        except NothingScoredError:
            return []
    for name, values in relevance.items():
        layer = name.partition(":")[2]
        found[name] = layer, relevance.members[name], values.numel()
    return [
        Group(layer, name.partition(":")[0], members, _dead(members, units, kept))
        for name, (layer, members, units) in found.items()
    ]


def _dead(members: Iterable[Member], units: int, kept: Callable[[str], Tensor | None]) -> Tensor:
    alive = torch.zeros(units, dtype=torch.bool, device="cpu")
    for member in members:
        mask = kept(member.parameter)
        if mask is None:
            return torch.zeros(units, dtype=torch.bool, device="cpu")
        alive |= member.any_kept(mask.cpu(), units)
    return ~alive
