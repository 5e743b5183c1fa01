"""Pairs of a layer's outputs: dense, and as they will be with masks and scales, product by product in one forward each."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lrp_prune.engine.batch_layout import BatchLayout, counted_places
from lrp_prune.engine.channels import channel_axis
from lrp_prune.engine.forms import Convolution
from lrp_prune.engine.origins import Layout, marked
from lrp_prune.engine.rules import Call
from lrp_prune.engine.uses import Product, RecurrentLayer
from lrp_prune.names import layer_of
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.moments import PairedMoments
from lrp_prune.pruning.places import BiasPlace, Place, shifted_in
from lrp_prune.pruning.processes import Turn, Turns
from lrp_prune.pruning.products import ComputedUses
from lrp_prune.pruning.recurrent_gates import Gates, copied, gates_of


class PlacedUses(ComputedUses):
    """Which places of weights a forward uses, in its order, and which of them nothing else uses.

    Args:
        masks: what is to be pruned.
    """

    def __init__(self, masks: Masks) -> None:
        super().__init__()
        self._masks = masks
        self.order: list[Turn] = []
        """Places as they came, and how many channels each has."""
        self.looked_up: set[str] = set()
        """Parameters that rows are taken from, as of an embedding."""
        self._used: dict[str, set[tuple[Layout, Place | None]]] = {}
        self._whole: dict[str, Layout] = {}
        self._tied: set[Place] | None = None

    @property
    def used(self) -> set[str]:
        """Parameters that were used."""
        return set(self._used)

    def is_alone(self, place: Place) -> bool:
        """Whether nothing else uses these entries, so that scaling them changes these outputs and no others."""
        return place not in self.tied

    @property
    def tied(self) -> set[Place]:
        """Places of which something else uses entries; to be asked for once the forward is done."""
        if self._tied is None:
            self._tied = set()
            for name, used in self._used.items():
                if name in self.looked_up or len(used) > 1:
                    self._tied |= _tied(used, self._whole[name], name in self.looked_up)
        return self._tied

    def _made(self, call: Call, found: Product, result: Tensor) -> None:
        """Note what a product uses."""
        parts = parts_of(found, call, result, self._masks)
        for part in parts:
            self._note(part.place.name, found.origin.parameter, part.place.layout, part.place)
            self._seen(part, found, result)
        if not parts:
            self._note(found.origin.name, found.origin.parameter, found.origin.layout, None)
        bias = call.bias
        origin = None if bias is None else marked(bias)
        if origin is not None:
            self._note(origin.name, origin.parameter, origin.layout, parts[0].place if parts else None)

    def _seen(self, part: "Part", found: Product, result: Tensor) -> None:
        """A place was used."""
        self.order.append((part.place, int(part.of(result).shape[part.axis])))

    def _note(self, name: str, whole: Layout, layout: Layout | None, place: Place | None) -> None:
        self._whole[name] = whole
        self._used.setdefault(name, set()).add((whole if layout is None else layout, place))


class DenseOutputs(PlacedUses):
    """The outputs of a forward as it is, of those products that masks are about."""

    def __init__(self, masks: Masks) -> None:
        super().__init__(masks)
        self.made: dict[Place, list[Tensor]] = {}
        self.states: dict[Place, list[Tensor]] = {}
        """Of recurrent layers those that the steps began with."""
        self._running: tuple[list[Gates], RecurrentLayer, Tensor, Tensor | None] | None = None

    @property
    def entries(self) -> int:
        """How many entries are kept."""
        return sum(entry.numel() for made in self.made.values() for entry in made)

    def _seen(self, part: "Part", found: Product, result: Tensor) -> None:
        """Keep what comes out: a copy, since the model may write into what it gets."""
        super()._seen(part, found, result)
        self.made.setdefault(part.place, []).append(part.of(result).detach().clone())

    def before_steps(self, layer: RecurrentLayer, x: Tensor, apart: bool, valid: Tensor | None) -> RecurrentLayer:
        """Remember what the steps are made with."""
        gates = gates_of(layer, apart, self._masks)
        self._running = (gates, layer, x.detach(), valid)
        return copied(layer) if gates else layer

    def after_steps(self, states: Callable[[], Tensor]) -> None:
        """Keep what the gates got."""
        assert self._running is not None
        (gates, layer, x, valid), self._running = self._running, None
        if not gates:
            return
        origins = [marked(entry) for entry in layer[:4] if entry is not None]
        whole = {origin.name: origin.parameter for origin in origins if origin is not None}
        before = states().detach()
        self.states.setdefault(gates[0].place, []).append(before)
        for entry in gates:
            for place in (entry.place, *entry.place.also):
                self._note(place.name, whole[place.name], place.layout, entry.place)
                if place.bias is not None:
                    self._note(place.bias.name, whole[place.bias.name], place.bias.layout, entry.place)
            with torch.no_grad():
                made = _without_padding(entry.computed(layer, x, before), valid)
            self.made.setdefault(entry.place, []).append(made)
            self.order.append((entry.place, int(made.shape[-1])))


class PrunedUses(ComputedUses):
    """Products of a model that masks are applied to, scaled and shifted by what is known so far.

    Args:
        masks: what is pruned.
        dense: the same batch's outputs of the dense model.
        channels: moments of each place.
        strength: see :meth:`PairedMoments.fit`.
        batch: tells which tokens are no padding.
        turns: sums moments over processes; None: what is known is only used.
        adding: whether this batch counts.
        biases: masks of those of which some entries are pruned, which get no shift.
    """

    replaces_values = True

    def __init__(
        self,
        masks: Masks,
        dense: DenseOutputs,
        channels: dict[Place, PairedMoments],
        strength: float,
        batch: BatchLayout,
        turns: Turns | None = None,
        adding: bool = True,
        biases: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self._biases = biases
        self._masks, self._channels, self._strength = masks, channels, strength
        self._batch, self._turns, self._adding = batch, turns, adding
        self._dense, self._is_alone = {place: iter(made) for place, made in dense.made.items()}, dense.is_alone
        self._states = {place: iter(made) for place, made in dense.states.items()}
        self.uneven: set[str] = set()
        """Weights whose outputs had another shape than the dense ones, so that there are no pairs."""

    def _made(self, call: Call, found: Product, result: Tensor) -> None:
        """Make it the product as it will be."""
        for part in parts_of(found, call, result, self._masks) if self._strength else ():
            if self._is_alone(part.place):
                counted = None if self._turns is None else part.counted(found, result, self._batch)
                self._scale_(part.place, part.of(result), part.axis, counted)

    def before_steps(self, layer: RecurrentLayer, x: Tensor, apart: bool, valid: Tensor | None) -> RecurrentLayer:
        """The parameters as they will be."""
        gates = gates_of(layer, apart, self._masks) if self._strength else []
        if not gates:
            return layer
        scaled = copied(layer)
        states = next(self._states.get(gates[0].place, iter(())), None)
        with torch.no_grad():
            for entry in gates:
                if self._is_alone(entry.place):
                    given = (
                        None if states is None or len(states) != len(x) else entry.computed(layer, x.detach(), states)
                    )
                    rows = None if given is None else _without_padding(given, valid)
                    counted = None if rows is None else self._batch.counted_rows(rows.shape, entry.place.name, None)
                    found = self._fitted(entry.place, rows, -1, entry.rows.stop - entry.rows.start, counted)
                    if found is not None:
                        entry.scale_(scaled, *found)
        return scaled

    def _scale_(self, place: Place, result: Tensor, axis: int, counted: Tensor | None) -> None:
        width = int(result.shape[axis])
        found = self._fitted(place, result.detach(), axis, width, counted)
        if found is not None:
            shape = [width if dim == axis else 1 for dim in range(result.dim())]
            scale, shift = (values.to(result).reshape(shape) for values in found)
            result.mul_(scale).add_(shift)

    def _fitted(
        self, place: Place, result: Tensor | None, axis: int, width: int, counted: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Scale and shift by what is known; None where that is too little."""
        if self._turns is not None:
            fresh, dense = PairedMoments(width), next(self._dense.get(place, iter(())), None)
            if self._adding and dense is not None and result is not None:
                if dense.shape == result.shape:
                    fresh.add(_rows(result, axis, counted), _rows(dense, axis, counted))
                else:
                    self.uneven.add(place.name)
            whole = self._turns.summed(place, fresh)
            if whole is not None:
                self._channels.setdefault(place, PairedMoments(width)).merge([whole])
        moments = self._channels.get(place)
        if moments is None or not moments.told:
            return None
        return moments.fit(self._strength, shifted_in(place.bias, self._biases))


def _rows(outputs: Tensor, axis: int, counted: Tensor | None) -> Tensor:
    outputs = outputs.movedim(axis, -1)
    return (outputs if counted is None else outputs[counted]).reshape(-1, outputs.shape[-1])


def _without_padding(gates: Tensor, valid: Tensor | None) -> Tensor:
    return gates if valid is None else gates[valid]


class Part(NamedTuple):
    """What of a product's outputs belongs to a place.

    Args:
        place: the place.
        rows: of the outputs along their first dimension; None: all of them.
        axis: of what that gives, along which it has channels.
    """

    place: Place
    rows: slice | int | None
    axis: int

    def of(self, result: Tensor) -> Tensor:
        """The part of the outputs; a view."""
        return result if self.rows is None else result[self.rows]

    def counted(self, found: Product, result: Tensor, batch: BatchLayout) -> Tensor | None:
        """Which of its rows, or places of a convolution, count; None for all."""
        if isinstance(found.form, Convolution):
            return counted_places(batch.counted, result.shape)
        if batch.counted is None or self.axis % self.of(result).dim() != self.of(result).dim() - 1:
            return None
        rows = batch.counted_rows(
            found.activation.shape, layer_of(self.place.name), get_gradient_edge(found.activation)
        )
        return None if rows is None else self.of(rows)


def parts_of(found: Product, call: Call, result: Any, masks: Masks) -> list[Part]:
    """The parts of a weight that can be scaled by their output channels: all of it, or each expert of a stack."""
    origin, form, weight = found.origin, found.form, found.weight
    if origin.name not in masks or origin.layout is None or origin.scaled or not isinstance(result, Tensor):
        return []
    if len(origin.layout.size) != weight.dim():
        return []
    axis = channel_axis(form, weight, result)
    if axis is None:
        return _experts(found, call, origin.layout, result)
    bias, placed = call.bias, None
    if bias is not None:
        added = marked(bias)
        if added is None or added.layout is None or added.scaled or len(bias) != result.shape[axis]:
            return []  # what is added is no parameter as it is, and would not be scaled with the rest
        placed = BiasPlace(added.name, added.layout)
    place = Place(origin.name, origin.layout, form.out_axis % weight.dim(), placed)
    return [Part(place, None, axis % result.dim())]


def _experts(found: Product, call: Call, layout: Layout, result: Tensor) -> list[Part]:
    """The layers of a stack ``[experts, in, out]``, each of which gets a run of the rows, or a batch of its own."""
    name, stack = call.function.__name__, found.weight
    if call.operand(1) is not stack or stack.dim() != 3:
        return []
    indices: list[slice | int]
    ends = call.kwargs.get("offs")
    if name in ("grouped_mm", "_grouped_mm") and isinstance(ends, Tensor) and result.dim() == 2:
        stops = ends.tolist()
        indices = [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
    elif name in ("bmm", "matmul") and result.dim() == 3 and len(result) == len(stack):
        indices = list(range(len(stack)))
    else:
        return []
    places = [
        Place(
            found.origin.name,
            Layout(layout.size[1:], layout.stride[1:], layout.offset + index * layout.stride[0]),
            1,
            None,
        )
        for index in range(len(stack))
    ]
    return [Part(place, index, 1) for place, index in zip(places, indices, strict=True)]


def _tied(used: set[tuple[Layout, Place | None]], whole: Layout, looked_up: bool) -> set[Place]:
    """The places whose entries of a parameter something else uses as well."""
    count = torch.empty_strided(whole.size, whole.stride, dtype=torch.int8, device="cpu").fill_(int(looked_up))
    for layout, _ in used:
        layout.once(layout.on(count)).add_(1)
    return {place for layout, place in used if place is not None and bool((layout.on(count) > 1).any())}
