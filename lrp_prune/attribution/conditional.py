"""Relevance on condition of units: what of the input speaks for a prediction by way of them, and of nothing else."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lrp_prune.engine.channels import by_activation, read_axes
from lrp_prune.engine.composites import Composite
from lrp_prune.engine.propagation import propagating
from lrp_prune.engine.tracing import UnitTracer
from lrp_prune.engine.uses import Observer, Use, WeightUses
from lrp_prune.names import layer_of, named_parameters

KINDS = ("neuron", "head")
"""Units that are channels which layers read, so that what goes through them can be told from the rest."""


class _Seen:
    """A use of a weight: the activation that it reads, and the relevance that comes back to that."""

    operand_dtype: torch.dtype | None = None
    propagated_dtype: torch.dtype | None = None

    def __init__(self, use: Use, backward_needed: bool) -> None:
        self.use, self.backward_needed = use, backward_needed
        self.activation: Tensor | None = None
        self.gradient: Tensor | None = None

    def forward(self, use: Use, activation: Tensor) -> None:
        """The activation, which the second pass goes on from."""
        self.activation = activation

    def backward(self, use: Use, activation: Tensor, d: Tensor, input_gradient: Tensor) -> None:
        """What comes back by this use alone, of all that read the activation."""
        self.gradient = input_gradient.detach().clone()


class Condition:
    """Propagates relevance from some units down, of which it is known what they have for an explained value.

    A first pass finds the units and what comes back to them, :math:`d_u`; in a second forward, whose uses of weights are shown to
    :attr:`uses`, the units' relevance :math:`\\sum_u a_u d_u` takes the place of the explained value (Achtibat et al. 2023, CRP).
    Paths that do not lead through the units, such as the shortcut beside them, take no part.

    Args:
        module: that is run.
        explained: runs it, and returns the explained values.
        composite: the rules.
        through: group -> places of units in it, as in ``attribute(model, ..., granularity=granularity)``.
        granularity: ``"neuron"`` or ``"head"``.
        unruled: what to do about operations without a rule.

    Raises:
        KeyError: for a group or a unit that the model does not have.
        ValueError: for units of another kind, or that no relevance reaches.
    """

    def __init__(
        self,
        module: nn.Module,
        explained: Callable[[], Tensor],
        composite: Composite,
        through: Mapping[str, Sequence[int]],
        granularity: str,
        unruled: str,
    ) -> None:
        if granularity not in KINDS:
            raise ValueError(f"through= is for units of the granularities {KINDS}, got {granularity!r}")
        if not any(through.values()):
            raise ValueError("through names no unit: pass {group: [places]}")
        self._tracer = UnitTracer(
            {name: tuple(each.shape) for name, each in named_parameters(module).items()}, [granularity]
        )
        self._seen: list[_Seen] = []
        uses = WeightUses(self._observers, self._tracer)
        with propagating(module, composite, None, unruled, uses, tracer=self._tracer, constants=True) as propagation:
            value = explained().sum()
            leaves = [root.leaf for root in propagation.roots()]
            propagation.check_reached(value, propagation.gradients(value, leaves))
        first = [seen for seen in self._seen if seen.activation is not None]
        known = self._channels_of_heads(first) if granularity == "head" else self._channels_of_neurons(first)
        wanted = {group: _checked(group, known, places) for group, places in through.items()}
        self._back: dict[int, Tensor] = {}
        for group, places in wanted.items():
            for index, channels in known[group][1].items():
                seen, chosen = first[index], torch.isin(channels, torch.tensor(places, device="cpu"))
                if seen.gradient is not None and bool(chosen.any()):
                    kept = seen.gradient * _along(chosen, seen)
                    self._back[index] = self._back[index] + kept if index in self._back else kept
        if not self._back:
            raise ValueError(
                f"no relevance reaches the units of {', '.join(wanted)}: the explained value does not depend on them"
            )
        self._seen, self.uses = [], WeightUses(self._shown)

    def values(self, samples: int) -> Tensor:
        """The units' relevance of each sample ``[samples]``; ``[1]``, of all, where an activation has no row for each."""
        found: list[Tensor] = []
        for index, back in self._back.items():
            activation = self._seen[index].activation
            assert activation is not None
            found.append(activation * back.to(activation.dtype))
        if all(each.shape[0] == samples for each in found):
            return torch.stack([each.flatten(1).sum(1) for each in found]).sum(0)
        return torch.stack([each.sum() for each in found]).sum().reshape(1)

    def _observers(self, use: Use) -> list[Observer]:
        if read_axes(use.form, use.weight, use.weight) is None:
            return []
        self._seen.append(_Seen(use, backward_needed=True))
        return [self._seen[-1]]

    def _shown(self, use: Use) -> list[Observer]:
        """The same uses in the same order, this time for their activations."""
        if read_axes(use.form, use.weight, use.weight) is None:
            return []
        self._seen.append(_Seen(use, backward_needed=False))
        return [self._seen[-1]]

    def _channels_of_neurons(self, first: list[_Seen]) -> dict[str, tuple[int, dict[int, Tensor]]]:
        """Group -> how many units it has, and for the uses that read it the unit of each channel, -1 for none."""
        table = self._tracer.table
        known: dict[str, tuple[int, dict[int, Tensor]]] = {}
        for group in table.groups()[0]:
            place_of = {int(number): place for place, number in enumerate(group.units.tolist())}
            known[group.name] = len(place_of), {}
            for index, seen in enumerate(first):
                reading = seen.use.reading
                if seen.use.origin.name in group.readers and reading is not None and reading.neurons is not None:
                    roots = table.roots(reading.neurons).tolist()
                    known[group.name][1][index] = torch.tensor([place_of.get(root, -1) for root in roots], device="cpu")
        return known

    def _channels_of_heads(self, first: list[_Seen]) -> dict[str, tuple[int, dict[int, Tensor]]]:
        """The same for heads, whose groups are the layers that read them."""
        known: dict[str, tuple[int, dict[int, Tensor]]] = {}
        for index, seen in enumerate(first):
            if seen.use.reading is not None and seen.use.reading.heads is not None:
                heads = seen.use.reading.heads.cpu()
                known.setdefault(layer_of(seen.use.origin.name), (int(heads.max()) + 1, {}))[1][index] = heads
        return known


def _checked(group: str, known: Mapping[str, tuple[int, dict[int, Tensor]]], places: Sequence[int]) -> list[int]:
    if group not in known:
        raise KeyError(f"there is no group of units {group!r}, there are {', '.join(list(known)[:6])}, ...")
    for place in places:
        if not 0 <= place < known[group][0]:
            raise KeyError(f"{group!r} has {known[group][0]} units, got {place}")
    return [int(place) for place in places]


def _along(chosen: Tensor, seen: _Seen) -> Tensor:
    """Of each channel of an activation, in a shape that broadcasts to it."""
    assert seen.gradient is not None
    return by_activation(seen.use.form, seen.use.weight, chosen.to(seen.gradient.device), seen.gradient)
