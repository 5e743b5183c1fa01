"""Shadows: for each entry of an activation, which unit it belongs to, carried through the functions of a forward.

A shadow is a tensor of unit numbers that broadcasts to its activation, so that a shadow of channels takes no more memory than
the channels. Functions that move entries (``view``, ``cat``, ``pixel_shuffle``, an index, ...) are simply run on it; functions
that stay within a channel (pooling, means, normalisation by a channel's own statistic) keep it where its numbers do not
change along what they bring together; elementwise functions combine the shadows of their operands.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lrp_prune.engine.operations import PRODUCTS, channels_of
from lrp_prune.engine.shadow import (
    MIXED,
    NOTHING,
    Call,
    Merge,
    Shadow,
    alike,
    cast_shadow,
    compact,
    shadow_of,
    together,
    units_in,
)
from lrp_prune.without_data import has_data


class Shadows:
    """Carries the shadows of one kind of units through a forward.

    Args:
        space: the kind.
        merge: what becomes of units that meet entry by entry in a sum or a product.
        lost: called with the numbers of units that go into an activation that is not theirs alone, whether they would be zero
            there, and the function's name.
        gated: whether a product with an activation of the same shape, whose units are not known, still belongs to the units.
    """

    def __init__(
        self, space: str, merge: Merge, lost: Callable[[Tensor, bool, str], None], gated: bool = False
    ) -> None:
        self.space, self._merge, self._lost, self._gated = space, merge, lost, gated

    def of(self, value: Any) -> Shadow | None:
        """The shadow of a tensor, if it has one."""
        return shadow_of(value, self.space)

    def after(self, call: Call) -> None:
        """Cast the shadow of a function's result."""
        if call.name == "__setitem__":
            self._assigned(*call.args)
            return
        if call.name == "copy":
            call = call._replace(name="clone", args=(call.args[1], *call.args[2:]))
        before = [shadow for value in call.tensors if (shadow := self.of(value)) is not None]
        outputs = call.outputs
        found: list[Shadow | None] = [None] * len(outputs)
        if before and any(output is not None and output.requires_grad for output in outputs):
            with torch._C.DisableTorchFunction(), torch.no_grad():
                answer = self._found(call)
                if answer is None:
                    for shadow in before:
                        # A weight reads zeros as nothing; what mixes channels and has as many of them (a softmax) does not.
                        kept = call.kind not in _READING and any(_has_its_places(shadow, output) for output in outputs)
                        self._lose(Shadow(shadow.numbers, shadow.zero and not kept), shadow.numbers, call)
                else:
                    found = answer
        for output, shadow in zip(outputs, found, strict=True):
            known = shadow is not None and output is not None and output.requires_grad and shadow.known
            cast_shadow(output, self.space, shadow if known else None)  # what was changed in place is not what it was

    def _assigned(self, target: Tensor, index: Any, value: Any) -> None:
        """``target[index] = value``."""
        own, other = self.of(target), self.of(value)
        if own is None and other is None:
            return
        with torch._C.DisableTorchFunction(), torch.no_grad():
            numbers = torch.full((), NOTHING if own is None else MIXED, dtype=torch.int32, device=target.device)
            numbers = (numbers if own is None else own.numbers).expand(target.shape).clone()
            index = _readable(index)
            if isinstance(value, Tensor):
                numbers[index] = _untold(value) if other is None else other.numbers.expand(value.shape)
            else:
                numbers[index] = NOTHING if value == 0 else MIXED
            zero = all(shadow.zero for shadow in (own, other) if shadow is not None)
            cast_shadow(target, self.space, Shadow(numbers, zero))

    def _lose(self, shadow: Shadow, numbers: Tensor, call: Call) -> None:
        units = units_in(numbers)
        if len(units):
            self._lost(units, shadow.zero, call.name or type(call.function).__name__)

    def _found(self, call: Call) -> list[Shadow | None] | None:
        """The shadows of the results; None if none of the units can be told apart any more."""
        name, kind, outputs = call.name, call.kind, call.outputs
        own = self.of(call.args[0]) if call.args else None
        first, rest = outputs[0], [None] * (len(outputs) - 1)
        channels = channels_of(name, kind)
        if channels == "copied":
            return [own, *rest]
        if channels == "moved" or name == "__get__":
            return _moved(call, self.of)
        if first is None:
            return None
        if kind == "normalization" and own is not None:
            return [self._normalized(own, call), *rest]
        if own is not None and channels == "pooled":
            dims = [dim for dim in range(own.numbers.dim()) if dim > (0 if own.numbers.dim() == 2 else 1)]
            return [Shadow(self._together(own, dims, call), own.zero), *rest]
        several = sum(self.of(value) is not None for value in call.tensors) > 1
        reducing = channels == "reduced" or (kind == "statistic" and first.shape != call.args[0].shape)
        if own is not None and reducing and not several:
            return [self._reduced(own, call), *rest]
        if kind in ("product", "division"):
            return [self._product(call, first), *rest]
        if channels == "entrywise":
            return [self._elementwise(call, first), *rest]
        return None

    def _together(self, own: Shadow, dims: Sequence[int], call: Call) -> Tensor:
        """:func:`together`, and telling which units are lost by it."""
        numbers = together(own.numbers, dims)
        mixed = (numbers == MIXED) & (own.numbers > NOTHING)
        self._lose(own, own.numbers[mixed], call)
        return numbers

    def _reduced(self, own: Shadow, call: Call) -> Shadow:
        """Sums, means and extremes over some dimensions."""
        argument, result = call.args[0], call.outputs[0]
        assert result is not None
        dims = _reduced_dims(argument, result, call)
        numbers = self._together(own, dims, call)
        if result.dim() < argument.dim():
            for dim in reversed(dims):
                numbers = numbers.squeeze(dim)
        return Shadow(numbers, own.zero)

    def _normalized(self, own: Shadow, call: Call) -> Shadow:
        """A normalisation keeps units that are normalised each by itself: the number does not change within a statistic.

        One by the root mean square keeps all: what others are divided by is no channel, whether written out or not.
        """
        argument: Tensor = call.args[0]
        dims = argument.dim()
        if call.name in ("batch_norm", "instance_norm"):
            numbers = self._together(own, [dim for dim in range(dims) if dim != 1], call)
            return Shadow(numbers, False)  # a shift remains, unless the unit owns it: who knows that says so
        if call.name == "group_norm":
            groups = call.args[1] if len(call.args) > 1 else call.kwargs["num_groups"]
            numbers = self._together(own, list(range(2, dims)), call)
            by_group = numbers.expand(-1, argument.shape[1], *numbers.shape[2:]).reshape(len(numbers), groups, -1)
            merged = self._together(Shadow(by_group, False), [2], call)  # less the mean, zero is zero no more
            numbers = merged.expand(by_group.shape).reshape(len(numbers), argument.shape[1], *(1,) * (dims - 2))
        else:
            shape = call.args[1] if len(call.args) > 1 else call.kwargs["normalized_shape"]
            over = list(range(dims - len(shape), dims))
            if call.name == "rms_norm":  # a scale common to all, and zero stays zero
                self._together(own, over, call)
                return own
            numbers = self._together(Shadow(own.numbers, False), over, call)  # less the mean, zero is zero no more
        shifted = any(value.dim() == 1 for value in call.tensors[1:])
        return Shadow(numbers, own.zero and not shifted)

    def _product(self, call: Call, result: Tensor) -> Shadow | None:
        """A channel of a product is gone when one of its factors is; what scales all channels alike is none of them."""
        factors = [value for value in call.tensors if value.requires_grad]
        whole = [value for value in factors if value.shape == result.shape]
        known = [shadow for value in whole if (shadow := self.of(value)) is not None]
        if self._gated:
            whole = [value for value in whole if self.of(value) is not None]
        along = {dim for shadow in known for dim, size in enumerate(shadow.numbers.shape) if size > 1}
        for value in factors:
            shadow = self.of(value)
            if shadow is None or (len(known) == len(whole) and any(value is other for other in whole)):
                continue
            apart = {dim for dim, size in enumerate(shadow.numbers.shape) if size > 1}
            if known and len(known) == len(whole) and value.dim() == result.dim() and along <= apart:
                known.append(shadow)  # a gate with one value for each channel
                whole.append(value)
            else:
                self._lose(shadow, shadow.numbers, call)
        if not known or len(known) < len(whole):
            return None
        numbers = known[0].numbers
        for other in known[1:]:
            numbers, theirs = alike(numbers, other.numbers)
            merged = self._merge(numbers, theirs)
            both = (numbers > NOTHING) & (theirs > NOTHING)
            numbers = torch.where(both, merged, torch.minimum(numbers, theirs))
        return Shadow(compact(numbers), any(shadow.zero for shadow in known))

    def _elementwise(self, call: Call, result: Tensor) -> Shadow:
        """Each entry of a sum, or of a function of one activation, belongs to the units of the entries it is made of."""
        parts = [value for value in call.tensors if value.is_floating_point() and value.dim() <= result.dim()]
        active = [value for value in parts if self.of(value) is not None or value.requires_grad]
        numbers, zero = torch.zeros((1,) * result.dim(), dtype=torch.int32, device=result.device), True
        for value in active:
            shadow = self.of(value)
            theirs = torch.full((1,) * value.dim(), MIXED, dtype=torch.int32, device=result.device)
            if shadow is not None:
                theirs, zero = shadow.numbers.to(result.device), zero and shadow.zero
            numbers, theirs = alike(numbers, theirs)
            merged = self._merge(numbers, theirs)
            both = (numbers > NOTHING) & (theirs > NOTHING)
            alone = torch.where(theirs == NOTHING, numbers, torch.where(numbers == NOTHING, theirs, MIXED))
            numbers = compact(torch.where(both, merged, alone))
        for value in active:
            shadow = self.of(value)
            if shadow is not None:
                mine, whole = alike(shadow.numbers, numbers)
                self._lose(shadow, mine[whole == MIXED], call)
        constants = len(parts) > len(active)
        if zero and len(active) == 1 and not constants:
            zero = keeps_zero(call, active[0])
        return Shadow(numbers, zero and not constants)


def _moved(call: Call, shadow_of: Callable[[Any], Shadow | None]) -> list[Shadow | None] | None:
    """The function itself, run on the shadows."""
    zero = True

    def numbers(value: Any) -> Any:
        nonlocal zero
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return _readable(value)
        shadow = shadow_of(value)
        if shadow is None:
            return torch.full((), _untold(value), dtype=torch.int32, device=value.device).expand(value.shape)
        zero &= shadow.zero
        if value is written:
            return shadow.numbers.clone()
        return shadow.numbers.expand(value.shape)

    # What turns a tensor in place has done so by now, and its shadow has the axes of before.
    written = call.args[0] if getattr(call.function, "__name__", "") in _TURNING else None
    args, kwargs = tree_map(numbers, (call.args, call.kwargs))
    if call.name in ("pad", "constant_pad_nd"):
        args, kwargs, padding = _padded_with_nothing(args, kwargs)
        zero &= padding == NOTHING
    moved: Any = None
    # What repeats by its stride cannot always be viewed as the activation can, and not all functions know integers.
    for made in (torch.Tensor.int, _made_whole, lambda value: _made_whole(value).double()):
        try:
            moved = call.function(*_each(args, made), **_each(kwargs, made))
            break
        except (RuntimeError, TypeError, NotImplementedError):
            continue
    entries = list(moved) if isinstance(moved, tuple | list) else [moved]
    if len(entries) != len(call.outputs) or not any(isinstance(entry, Tensor) for entry in entries):
        return None
    if written is not None and any(entry.dim() != written.dim() for entry in entries):
        return None
    return [Shadow(compact(entry.to(torch.int32)), zero) if isinstance(entry, Tensor) else None for entry in entries]


_TURNING = {"squeeze_", "unsqueeze_", "transpose_", "swapaxes_", "swapdims_", "t_"}
"""What changes the axes of a tensor in place; of a shadow, whose axes may be shorter, ``squeeze_()`` takes others as well."""


def _untold(value: Tensor) -> int:
    """The number of entries without units: they are nothing only where they are zero, since layers read the others as well."""
    return MIXED if value.requires_grad or (has_data(value) and bool(value.any())) else NOTHING


def _readable(index: Any) -> Any:
    """An index with entries: in a run without data the first, which stands for all."""
    return tree_map(lambda value: _first(value) if isinstance(value, Tensor) and not has_data(value) else value, index)


def _first(index: Tensor) -> Tensor:
    return torch.zeros(index.shape, dtype=index.dtype, device="cpu")


def _padded_with_nothing(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], float]:
    """The arguments of a padding that pads with :data:`NOTHING`, and what it padded with."""
    numeric = [index for index, value in enumerate(args) if isinstance(value, int | float)]
    value = kwargs.get("value", args[numeric[0]] if numeric else None) or 0.0
    replaced = tuple(NOTHING if index in numeric else entry for index, entry in enumerate(args))
    return replaced, {name: entry for name, entry in kwargs.items() if name != "value"}, float(value)


def _made_whole(numbers: Tensor) -> Tensor:
    return numbers.contiguous()


def _each(values: Any, made: Callable[[Tensor], Tensor]) -> Any:
    return tree_map(
        lambda value: made(value) if isinstance(value, Tensor) and value.dtype == torch.int32 else value, values
    )


def _reduced_dims(argument: Tensor, result: Tensor, call: Call) -> list[int]:
    """The dimensions that a reduction goes over: all of them if it names none."""
    given = next((call.kwargs[key] for key in ("dim", "axis") if call.kwargs.get(key) is not None), None)
    if given is None:
        # The norm's order comes before its dimensions, and whether they are kept after them.
        numbers = [
            value for value in call.args[1:] if isinstance(value, int | tuple | list) and not isinstance(value, bool)
        ]
        given = numbers[-1] if numbers else None
    dims = range(argument.dim()) if given is None else [given] if isinstance(given, int) else given
    return sorted(dim % argument.dim() for dim in dims)


def keeps_zero(call: Call, active: Tensor) -> bool:
    """Whether an elementwise function of one activation is zero at zero, by asking it."""

    def at_zero(value: Any) -> Any:
        if value is active:
            return torch.zeros((1,) * max(active.dim(), 1), dtype=active.dtype, device=active.device)
        return value

    try:
        value = call.function(*map(at_zero, call.args), **{name: at_zero(arg) for name, arg in call.kwargs.items()})
        return bool((value == 0).all())
    except (RuntimeError, TypeError, AttributeError):
        return False


_READING = PRODUCTS | {"attention", "recurrent", "product", "division"}
"""Kinds of operations to which a channel of zeros adds nothing, whatever becomes of the axis."""


def _has_its_places(shadow: Shadow, output: Tensor | None) -> bool:
    """Whether an output has the places of what is shadowed."""
    if output is None or output.dim() != shadow.numbers.dim():
        return False
    return all(number in (1, size) for number, size in zip(shadow.numbers.shape, output.shape, strict=True))
