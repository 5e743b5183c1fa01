"""A model as it was before it was pruned, for the time of a forward, without a second model."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.names import resolve


class EarlierValues:
    r"""Values that a model had, which can stand in it for a while.

    Of tensors that go on changing all values are kept, :math:`W_0`; of the others only what is pruned, so that
    :math:`M \odot W + (1 - M) \odot W_0` is what they were. Of a model whose weights are all trained that is a copy of its
    weights; of one in which only adapters are, a copy of these and of what was pruned.

    Args:
        model: as it is now.
        whole: names of parameters and buffers, as ``named_parameters()`` and ``named_buffers()`` have them, of which all values
            are kept.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> before = model.weight.detach().clone()
        >>> earlier = EarlierValues(model, whole=[])
        >>> masks = {"weight": torch.tensor([[True, False]])}
        >>> earlier.remember(model, masks)
        >>> model.weight.data[0, 1] = 0.0
        >>> with earlier.standing_in(model):
        ...     torch.equal(model.weight, before)
        True
        >>> model.weight[0, 1].item()
        0.0
    """

    def __init__(self, model: nn.Module, whole: Collection[str]) -> None:
        self._whole: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._pruned: dict[str, Tensor] = {}
        self.keep_whole(model, whole)

    @property
    def nbytes(self) -> int:
        """Bytes of the values, and of where the pruned ones belong: one for each weight."""
        return sum(value.nbytes for held in (self._whole, self._kept, self._pruned) for value in held.values())

    def keep_whole(self, model: nn.Module, names: Collection[str]) -> None:
        """From now on keep all values of these tensors, which are about to change and were not kept so far.

        Args:
            model: in which they are still as they were, but for what was remembered.
            names: as for the constructor.
        """
        held = _tensors(model)
        fresh = [name for name in names if name not in self._whole]
        pruned = {id(parameter): name for name, parameter in resolve(self._kept, model).items()} if fresh else {}
        for name in fresh:
            value = self._whole[name] = held[name].detach().clone()
            known = pruned.get(id(held[name]))
            if known is not None:
                value[~self._kept.pop(known).to(value.device)] = self._pruned.pop(known).to(value)

    def remember(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Keep what masks are going to zero, where nothing is pruned yet but what was remembered before.

        Args:
            model: right before these masks are applied.
            masks: canonical name to a bool tensor, True where the weight is kept.
        """
        held = _tensors(model)
        whole = {id(held[name]) for name in self._whole}
        for name, parameter in resolve(masks, model).items():
            if id(parameter) in whole:
                continue
            kept = masks[name].to(parameter.device)
            if bool(kept.all()):
                continue
            values = parameter.detach().clone()
            if name in self._kept:
                before = ~self._kept[name].to(parameter.device)
                values[before] = self._pruned[name].to(values)
            self._kept[name], self._pruned[name] = kept, values[~kept]

    @contextmanager
    def standing_in(self, model: nn.Module) -> Iterator[None]:
        """The model with these values, whatever its graph holds: its own are back, bit for bit, before a backward sees them."""
        held = _tensors(model)
        own = {name: held[name].data for name in self._whole}
        pruned = resolve(self._kept, model) if self._kept else {}
        try:
            for name, value in self._whole.items():
                if value.device != own[name].device:
                    value = self._whole[name] = value.to(own[name].device)
                held[name].data = value
            for name, parameter in pruned.items():
                if self._kept[name].device != parameter.device:
                    self._kept[name] = self._kept[name].to(parameter.device)
                    self._pruned[name] = self._pruned[name].to(parameter.device)
                # Through .data, which no graph sees: saved tensors count changes.
                parameter.data.masked_scatter_(~self._kept[name], self._pruned[name])
            torch.clear_autocast_cache()  # which may have the weights as they were
            yield
        finally:
            for name, value in own.items():
                held[name].data = value
            for name, parameter in pruned.items():
                parameter.data.masked_fill_(~self._kept[name], 0.0)
            torch.clear_autocast_cache()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, for a checkpoint."""
        return {"whole": dict(self._whole), "kept": dict(self._kept), "pruned": dict(self._pruned)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "EarlierValues":
        """What :meth:`state_dict` gave."""
        earlier = cls(nn.Module(), ())
        earlier._whole, earlier._kept = dict(state["whole"]), dict(state["kept"])
        earlier._pruned = dict(state["pruned"])
        return earlier


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
