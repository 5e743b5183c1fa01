"""Tracing units: which channels a layer reads belong to which hidden unit or head, found in the forward itself.

What is a unit, and is found without knowing the model's class:

* a *neuron* is a channel that layers write and layers read, with nothing between that mixes channels (a filter of a
  convolution with its bias and batch norm; the row of both inputs of a gated product);
* a *head* is what one head of an attention writes to the layer that reads it (the output projection);
* a *block* is what a layer writes onto a residual stream.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrp_prune.engine.blocks import Blocks
from lrp_prune.engine.channels import by_weight, channel_axis, channels_last, on_parameter, passes_channels, read_axes
from lrp_prune.engine.forms import Convolution, Form
from lrp_prune.engine.ids import LOOKUPS
from lrp_prune.engine.operations import PRODUCTS
from lrp_prune.engine.origins import Origin, Slot, marked
from lrp_prune.engine.shadow import MIXED, NOTHING, Call, Shadow, cast_shadow, per_channel, units_in
from lrp_prune.engine.shadows import Shadows
from lrp_prune.engine.tags import tag_of
from lrp_prune.engine.unit_table import UnitTable
from lrp_prune.without_data import on_own_data

STACKED = "it holds several layers, as those of the experts of a mixture, whose channels are not told apart"
"""Why a weight that is multiplied layer by layer has no units."""


class Reading(NamedTuple):
    """What a layer reads: the unit of each of its input channels, int32 ``[channels]``."""

    neurons: Tensor | None
    """Numbers of the table; -1 and 0 where there is no unit."""
    heads: Tensor | None
    """Counted from 0, each layer's own."""
    channels: int
    """How many there are."""
    passes: bool
    """Whether the units go on to the layer's output: it is one of those that make them, and reads nothing of its own."""


class UnitTracer:
    """Follows the units of some granularities through forwards.

    Args:
        shapes: of all parameters, by canonical name.
        granularities: ``"neuron"``, ``"head"``, ``"block"``, or several.
    """

    @on_own_data()
    def __init__(self, shapes: Mapping[str, tuple[int, ...]], granularities: Iterable[str]) -> None:
        self.table = UnitTable(shapes)
        wanted = set(granularities)
        self._neurons = Shadows("neuron", self.table.merge, self.table.lose) if "neuron" in wanted else None
        self._heads = Shadows("head", lambda first, _: first, lambda *_: None, gated=True) if "head" in wanted else None
        self.blocks = Blocks() if "block" in wanted else None
        self._known_heads: dict[str, Tensor] = {}
        self._written: Tensor | None = None

    def _spaces(self) -> list[Shadows]:
        return [space for space in (self._neurons, self._heads) if space is not None]

    def carry(self, source: Any, copy: Any) -> None:
        """A copy that was made out of sight is what it is a copy of."""
        for space in self._spaces():
            cast_shadow(copy, space.space, space.of(source))
        if self.blocks is not None:
            self.blocks.carry(source, copy)

    @on_own_data()
    def outputs(self, values: Iterable[Any]) -> None:
        """The model's own outputs: no unit may be among them."""
        for value in values:
            shadow = None if self._neurons is None else self._neurons.of(value)
            if shadow is not None:
                units = units_in(shadow.numbers)
                self.table.end(units, "the model's output")
                self.table.refuse(units, "its channels are outputs of the model")

    @on_own_data()
    def after(self, call: Call) -> None:
        """Follow a function that has just run."""
        if self._written is not None and call.result is self._written:
            self._written = None  # a layer, which was told about by itself
            return
        for space in self._spaces():
            space.after(call)
        if self.blocks is not None:
            self.blocks.after(call)
        if self._neurons is not None:
            self._own_shifts(call)
            self._looked_up(call)
        if self._heads is not None and _is_attended(call):
            self._cast_heads(call.result)

    @on_own_data()
    def reads(self, form: Form, weight: Tensor, origin: Origin, activation: Tensor) -> Reading:
        """What a layer reads, before it runs."""
        neurons = None if self._neurons is None else self._read_neurons(form, weight, origin, activation)
        axes = read_axes(form, weight, activation)
        channels = 0 if axes is None else math.prod(activation.shape[axis] for axis in axes)
        return Reading(
            neurons, self._read_heads(form, weight, origin, activation), channels, passes_channels(form, weight)
        )

    @on_own_data()
    def writes(
        self, form: Form, weight: Tensor, origin: Origin, reading: Reading, bias: Tensor | None, result: Tensor
    ) -> None:
        """Give the channels that a layer has just written their units."""
        self._written = result
        if self.blocks is not None:
            self.blocks.write(result, origin.name, bias)
        if self._heads is not None:
            cast_shadow(result, "head", None)
        if self._neurons is None:
            return
        cast_shadow(result, "neuron", None)
        axis = channel_axis(form, weight, result)
        if axis is None and weight.dim() > 2:
            self.table.leave(origin.name, STACKED)
        origin, slot = _alone(origin)
        if axis is None or origin.layout is None or len(origin.parameter.size) != weight.dim():
            return
        channels = int(result.shape[axis])
        passed = reading.neurons if reading.passes else None
        if passed is not None and bool((passed > NOTHING).all()):
            numbers = passed
        else:
            # A layer that is used upright and transposed (tied factors) has other channels in each.
            numbers = self.table.numbers_for(origin.name, (origin.layout, form.out_axis), channels, slot)
            numbers = numbers if passed is None else torch.where(passed > NOTHING, passed, numbers)
        rows = on_parameter(by_weight(form, weight, numbers, reading=False), origin)
        if rows is None:
            return
        self.table.own(origin.name, (origin.layout, "writes"), rows, slot=slot)
        owner = None if bias is None else marked(bias)
        if owner is not None and owner.layout is not None:
            owner, own_slot = _alone(owner)
            assert owner.layout is not None
            shift = on_parameter(numbers, owner)
            if shift is not None:
                self.table.own(owner.name, owner.layout, shift, slot=own_slot)
        zero = bias is None or owner is not None
        shape = [channels if dim == axis % result.dim() else 1 for dim in range(result.dim())]
        cast_shadow(result, "neuron", Shadow(numbers.to(result.device).reshape(shape), zero))

    def _read_neurons(self, form: Form, weight: Tensor, origin: Origin, activation: Tensor) -> Tensor | None:
        assert self._neurons is not None
        shadow, name = self._neurons.of(activation), form.call.function.__name__
        origin, slot = _alone(origin)
        if shadow is None:
            if origin.layout is not None:  # of another use of the same weights that reads units
                untold = torch.full((1,) * len(origin.parameter.size), MIXED, dtype=torch.int32, device="cpu")
                reads = not passes_channels(form, weight)
                self.table.own(origin.name, (origin.layout, "reads"), untold, reads=reads, slot=slot)
            return None
        axis, numbers, table = channel_axis(form, weight, activation), None, None
        if axis is not None and origin.layout is not None and len(origin.parameter.size) == weight.dim():
            numbers = per_channel(shadow, activation.shape[axis], axis).cpu()
            table = on_parameter(by_weight(form, weight, numbers, reading=True), origin)
        units = units_in(shadow.numbers).cpu()
        unread = units if table is None or numbers is None else units[~torch.isin(units, numbers)]
        if len(unread):
            self.table.lose(unread, shadow.zero, name)
        if numbers is None or table is None:
            return None
        reads = not passes_channels(form, weight)
        self.table.own(origin.name, (origin.layout, "reads"), table, reads=reads, zero=shadow.zero, slot=slot)
        return numbers

    def _read_heads(self, form: Form, weight: Tensor, origin: Origin, activation: Tensor) -> Tensor | None:
        """The head of each channel, counted from 0: which channels have the same number, in each token alike."""
        shadow = None if self._heads is None else self._heads.of(activation)
        axes = None if shadow is None else read_axes(form, weight, activation)
        if shadow is None or axes is None or isinstance(form, Convolution):
            return None
        channels = math.prod(activation.shape[axis] for axis in axes)
        known = self._known_heads.get(origin.name)
        if known is not None and len(known) == channels:
            return known
        shape = [
            activation.shape[dim] if dim - activation.dim() in axes or dim in axes else size
            for dim, size in enumerate(shadow.numbers.shape)
        ]
        numbers = channels_last(form, weight, shadow.numbers.expand(shape)).reshape(-1, channels)
        row = numbers[0].tolist()
        first = {number: index for index, number in reversed(list(enumerate(row)))}
        same_as = torch.tensor([first[number] for number in row], device=numbers.device)
        if min(first) <= NOTHING or not bool((numbers == numbers[:, same_as]).all()):
            return None
        order = {index: head for head, index in enumerate(sorted(first.values()))}
        found = self._known_heads[origin.name] = torch.tensor(
            [order[i] for i in same_as.tolist()], dtype=torch.int32, device="cpu"
        )
        return found

    def _cast_heads(self, result: Any) -> None:
        """Each index but the last of an attention's result is a head of some token of some sample."""
        if not isinstance(result, Tensor) or result.dim() < 2:
            return
        numbers = torch.arange(1, 1 + math.prod(result.shape[:-1]), dtype=torch.int32, device=result.device)
        cast_shadow(result, "head", Shadow(numbers.reshape(*result.shape[:-1], 1)))

    def _looked_up(self, call: Call) -> None:
        """A table from which entries are looked up may be a weight as well, that of an output tied to it say."""
        first = call.outputs[0] if call.outputs else None
        by_index = call.name in LOOKUPS and first is not None and first.requires_grad
        if call.kind == "embedding" or by_index:
            for origin in filter(None, map(marked, call.tensors)):
                self.table.use_otherwise(origin.name)

    def _own_shifts(self, call: Call) -> None:
        """What is added to channels by a parameter with an entry for each belongs to their units, and so does a norm's scale."""
        assert self._neurons is not None
        outputs = call.outputs
        shadow = None if not outputs or outputs[0] is None else self._neurons.of(outputs[0])
        if shadow is None or shadow.zero:
            return
        if call.kind == "normalization" and call.name in ("batch_norm", "instance_norm", "group_norm"):
            parameters = [value for value in call.tensors[1:] if marked(value) is not None]
            before = self._neurons.of(call.args[0])
            needed = 2
        elif call.kind == "sum" and call.name in ("add", "sub", "subtract"):
            parameters = [value for value in call.tensors if marked(value) is not None and not value.requires_grad]
            before = next((self._neurons.of(value) for value in call.tensors if self._neurons.of(value)), None)
            needed = 1
            if len(call.tensors) != 2:
                return
        else:
            return
        owned = [self._own_shift(value, shadow, call) for value in parameters]
        was_zero = before is not None and before.zero
        if sum(owned) == needed and (was_zero or call.kind == "normalization"):
            cast_shadow(outputs[0], "neuron", shadow._replace(zero=True))

    def _own_shift(self, value: Tensor, shadow: Shadow, call: Call) -> bool:
        given, channels = marked(value), call.outputs[0]
        if given is None or given.layout is None or channels is None:
            return False
        origin, slot = _alone(given)
        assert origin.layout is not None
        axis = 1 if call.kind == "normalization" else _only_long(value, channels.dim())
        if axis is None:
            return False
        numbers = per_channel(shadow, channels.shape[axis], axis)
        # All of a vector, also of one in disguise such as (1, 1, 1, D).
        size, whole = origin.parameter.size, math.prod(origin.parameter.size)
        if bool((numbers <= NOTHING).any()) or len(numbers) != value.numel() or max(size, default=1) != whole:
            return False
        if origin.layout.offset != 0 or math.prod(origin.layout.size) != whole:
            return False
        self.table.own(origin.name, "shift", numbers.cpu().reshape(size), slot=slot)
        return True


def _alone(origin: Origin) -> tuple[Origin, Slot | None]:
    """The origin of a layer as if it had a parameter of its own, and where in a stack it is, if it is in one."""
    found = origin.in_stack()
    return (origin, None) if found is None else found


def _is_attended(call: Call) -> bool:
    """Whether a function's result is what attention heads write: a pattern times values."""
    if call.kind == "attention":
        return True
    if call.kind not in PRODUCTS:
        return False
    # Where a rule has stopped the pattern, it is no activation any more, but still a pattern.
    operands = [value for value in call.tensors if value.requires_grad or tag_of(value) is not None]
    tag = tag_of(operands[0]) if len(operands) == 2 else None
    return tag is not None and tag.pattern


def _only_long(value: Tensor, dims: int) -> int | None:
    """The axis of a result with so many dimensions that the only long axis of an operand lies along; None if it has several."""
    long = [axis for axis, size in enumerate(value.shape) if size > 1]
    if len(long) > 1 or value.dim() == 0:
        return None
    return dims - value.dim() + (long[0] if long else value.dim() - 1)
