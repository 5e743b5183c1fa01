"""Parameters as a layer's update needs them: whole, with their dense values and what is kept of them, one layer at a time."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrp_prune.distributed.sharding import local_part, sharding_of
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.places import Place


@dataclass(frozen=True)
class Whole:
    """All of one parameter, which processes may have parts of.

    Args:
        parameter: of the model.
        now: its values; of an ordinary parameter itself, else a copy that is gathered from all parts.
        dense: its values in the dense model.
        kept: boolean, what of it is kept.
    """

    parameter: nn.Parameter
    now: Tensor
    dense: Tensor
    kept: Tensor

    @torch.no_grad()
    def write_(self) -> None:
        """Write :attr:`now` into what of the parameter is here."""
        here, sharding = local_part(self.parameter), sharding_of(self.parameter)
        if sharding.is_divided:
            here.copy_(sharding.part(self.now))


class Wholes:
    """The parameters of one layer after the other; all processes that have parts of them ask for the same ones.

    Args:
        parameters: of the model, by name.
        before: dense values of those of a stage, of what is here; others have not changed.
        masks: what is pruned.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], before: Mapping[str, Tensor], masks: Masks) -> None:
        self._parameters, self._before, self._masks = parameters, before, masks
        self._known: dict[str, Whole] = {}

    def of(self, place: Place) -> Mapping[str, Whole]:
        """The weight of a layer and its bias, until another layer's are asked for: experts of a stack have one weight."""
        names = [place.name, *([place.bias.name] if place.bias is not None else [])]
        known = {name: self._known[name] for name in names if name in self._known}
        self._known = known  # before others are made
        self._known = {name: known[name] if name in known else self._made(name) for name in names}
        return self._known

    def _made(self, name: str) -> Whole:
        parameter = self._parameters[name]
        here, sharding = local_part(parameter), sharding_of(parameter, name)
        before = self._before.get(name, here)  # a bias may be another module's
        now = sharding.gathered(here)
        kept = torch.empty_strided(now.shape, now.stride(), dtype=torch.bool, device=now.device)
        kept.copy_(self._masks.whole(name)) if name in self._masks else kept.fill_(True)
        return Whole(parameter, now, sharding.gathered(before), kept)


def copies_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The values of parameters as they are now, of what is here."""
    return {name: local_part(parameter).clone() for name, parameter in parameters.items()}


@torch.no_grad()
def zero_(masks: Masks, weights: Mapping[str, nn.Parameter], which: Iterable[nn.Parameter]) -> None:
    """Apply masks to some of their weights.

    Args:
        masks: what is pruned.
        weights: their weights, by their names.
        which: others are left alone.
    """
    wanted = {id(entry) for entry in which}
    for name, weight in weights.items():
        if id(weight) in wanted:
            local_part(weight)[~masks.part(name, weight)] = 0
