"""Constants that come from parameters: where in a parameter a tensor's entries lie.

Models reach their weights through views (``weight.T``, one expert of a stack), casts and reparametrizations, so a tensor made
from parameters alone carries a mark that says which parameter it came from and, where that is still known, which entry of
the parameter each of its entries is. It is known as long as a zero in the parameter is a zero in the tensor: through masks and
scales (``weight * mask``, ``weight / sigma``), but not through sums and products of matrices.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrp_prune.engine.facts import Fact
from lrp_prune.engine.operations import PRODUCTS
from lrp_prune.relevance.unscored import RESCALED, computed
from lrp_prune.without_data import has_data, keeps_zeros, on_own_data

_ELEMENTWISE = frozenset(
    "abs neg negative sign clamp clip clamp_min clamp_max round floor ceil trunc fix absolute".split()
)
"""Elementwise functions beside activations; whether they keep zeros depends on their arguments, and is tried."""

_CHOOSING = frozenset("where masked_fill __setitem__".split())
"""Functions that put other entries in the place of some."""
RESHAPING = frozenset({"reshape", "view", "flatten", "unflatten", "unsqueeze", "squeeze"})
"""Functions that give another shape to entries in their order, in a copy where no view has it."""
_OWN_NORM = frozenset({"_weight_norm", "_weight_norm_interface"})


class Layout(NamedTuple):
    """Where the entries of a strided tensor lie in memory, relative to the parameter's first entry."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def on(self, tensor: Tensor) -> Tensor:
        """The same entries of a tensor that is laid out as the parameter is."""
        if self == (tuple(tensor.size()), tuple(tensor.stride()), 0):
            return tensor
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)

    def once(self, tensor: Tensor) -> Tensor:
        """A tensor of this size, without the repetitions of entries that stand at several places (of what was expanded)."""
        repeated = [size > 1 and step == 0 for size, step in zip(self.size, self.stride, strict=True)]
        return tensor[tuple(slice(0, 1) if again else slice(None) for again in repeated)] if any(repeated) else tensor

    def add_to(self, tensor: Tensor, values: Tensor) -> None:
        """Add values of this size to the same entries of a tensor that is laid out as the parameter is."""
        view = self.once(self.on(tensor))
        values = values.reshape(self.size).to(view.device)
        view.add_(values if values.shape == view.shape else values.sum_to_size(view.shape))


class Slot(NamedTuple):
    """One of several layers that are stacked in a parameter: which, counted from 0, and of how many."""

    layer: int
    layers: int


class Origin(NamedTuple):
    """What a tensor was made of.

    Args:
        name: the parameter's canonical name.
        parameter: the parameter's own layout.
        layout: that of the tensor within it; None where its entries are none of the parameter's.
        scaled: whether the entries have other values than in the parameter.
        steps: the functions that made it something else, if ``layout`` is None.
        rescaled: whether these are a division by a norm of the parameter itself.
        others: further parameters that went into it.
        arithmetic: whether more than views, copies and picking of entries did, if ``layout`` is None.
        product: whether a product of matrices did.
        trained: whether the parameter requires a gradient, by which torch chooses how it multiplies.
        copied: where it is a copy, in another shape, of entries that no strides in that shape tell: their layout, in the copy's
            order; ``layout`` is None.
    """

    name: str
    parameter: Layout
    layout: Layout | None
    scaled: bool = False
    steps: tuple[str, ...] = ()
    rescaled: bool = False
    others: tuple[str, ...] = ()
    arithmetic: bool = False
    product: bool = False
    trained: bool = False
    copied: Layout | None = None

    @property
    def entries(self) -> Layout | None:
        """Which entries of the parameter it has, in their order, maybe in another shape; None if they are none."""
        return self.copied if self.layout is None else self.layout

    def dim(self, axis: int) -> int | None:
        """The parameter's dimension that an axis of the tensor is, where the tensor is the parameter up to a transposition."""
        if self.layout is None or self.layout.offset != 0 or sorted(self.layout.size) != sorted(self.parameter.size):
            return None
        if self.layout == self.parameter:  # also where dimensions of size one have the same stride as another
            return axis % len(self.parameter.size)
        stride = self.layout.stride[axis]
        return self.parameter.stride.index(stride) if stride in self.parameter.stride else None

    def dims(self) -> list[int] | None:
        """The parameter's dimension that each axis of the tensor goes along, all of it or a part; None where one goes along none.

        Axes of size one, whose stride says nothing, go where there is one of that size.
        """
        if self.layout is None:
            return None
        found: list[int] = []
        for size, stride in zip(self.layout.size, self.layout.stride, strict=True):
            fitting = [
                dim
                for dim, (whole, step) in enumerate(zip(self.parameter.size, self.parameter.stride, strict=True))
                if step == stride and size <= whole and dim not in found
            ]
            fitting = [dim for dim in fitting if self.parameter.size[dim] == size] or fitting
            if not fitting:
                return None
            found.append(fitting[0])
        return found

    def flattened_axis(self) -> int | None:
        """The axis along the parameter's first dimension of a matrix whose other axis goes along all others (of patches)."""
        layout, whole = self.layout, self.parameter
        if layout is None or len(whole.size) < 3 or layout.offset:
            return None
        first = whole.size[0], whole.stride[0]
        rest = math.prod(whole.size[1:]), whole.stride[-1]
        dense = all(
            whole.stride[dim] == whole.stride[dim + 1] * whole.size[dim + 1] for dim in range(1, len(whole.size) - 1)
        )
        axes = list(zip(layout.size, layout.stride, strict=True))
        return axes.index(first) if dense and axes in ([first, rest], [rest, first]) else None

    def in_stack(self) -> "tuple[Origin, Slot] | None":
        """As the origin of one layer of a stack, where the tensor is one entry of the parameter's first dimension; and which."""
        layout, whole = self.layout, self.parameter
        if layout is None or len(whole.size) != len(layout.size) + 1 or whole.size[0] < 2 or whole.stride[0] < 1:
            return None
        one = Layout(whole.size[1:], whole.stride[1:], 0)
        index, beyond = divmod(layout.offset, whole.stride[0])
        axes = sorted(zip(layout.size, layout.stride, strict=True))
        if beyond or not 0 <= index < whole.size[0] or axes != sorted(zip(one.size, one.stride, strict=True)):
            return None
        return self._replace(parameter=one, layout=layout._replace(offset=0)), Slot(index, whole.size[0])

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters that went into it."""
        return (self.name, *self.others)

    @property
    def reason(self) -> str | None:
        """Why zeros in the parameter would not do; None if they would."""
        if self.entries is not None:
            return None
        return RESCALED if self.rescaled else computed(self.steps)


def origin_of_parameter(name: str, parameter: Tensor) -> Origin:
    """The origin of the whole parameter."""
    layout = Layout(tuple(parameter.size()), tuple(parameter.stride()), 0)
    return Origin(name, layout, layout, trained=parameter.requires_grad)


_ORIGIN: Fact[Origin] = Fact("origin")
_SOURCE: Fact[Origin] = Fact("source")
mark, marked = _ORIGIN.note, _ORIGIN.of
note_source = _SOURCE.note
"""Remembers what a constant was computed from: it is no part of the parameter, but made of it."""


def source_of(tensor: Tensor) -> Origin | None:
    """The parameter that a constant is a part of, or was computed from."""
    return marked(tensor) or _SOURCE.of(tensor)


def derive(
    origin: Origin, source: Tensor, result: Tensor, elementwise: bool, name: str, again: Callable[[Tensor], Any]
) -> Origin:
    """The origin of ``result``, a view, a cast or something else that was made from ``source``, whose origin is given.

    A view shares the storage, so its place is its place in the storage; a cast or copy of the same shape keeps the place
    of its source; of anything else only the name is known.

    Args:
        origin: that of the source.
        source: what the function was applied to.
        result: what came out.
        elementwise: whether the function keeps the meaning of each entry.
        name: the function's.
        again: applies it to another tensor.
    """
    if origin.layout is None:
        kept = (elementwise and result.shape == source.shape) or _in_order(name, source, result)
        return origin if origin.copied is None or kept else lost(name, [origin])
    if result.untyped_storage()._cdata == source.untyped_storage()._cdata and result.dtype == source.dtype:
        if source.stride() == origin.layout.stride:
            offset = int(result.storage_offset() - source.storage_offset()) + origin.layout.offset
            return origin._replace(layout=Layout(tuple(result.size()), tuple(result.stride()), offset))
        # A copy that lies in memory otherwise than in the parameter: look where the entries would come to lie there.
        stand_in = torch.empty_strided(origin.parameter.size, origin.parameter.stride, device="meta")
        try:
            viewed = again(origin.layout.on(stand_in))
        except RuntimeError:  # no view of the parameter is what is one of the copy
            viewed = None
        if isinstance(viewed, Tensor) and viewed.shape == result.shape and viewed._is_view():
            layout = Layout(tuple(viewed.size()), tuple(viewed.stride()), int(viewed.storage_offset()))
            return origin._replace(layout=layout)
    elif elementwise and result.shape == source.shape:
        return origin
    if _in_order(name, source, result) and not origin.scaled:
        return origin._replace(layout=None, copied=origin.layout, steps=(name,))
    return lost(name, [origin])


def _in_order(name: str, source: Tensor, result: Tensor) -> bool:
    """Whether a function has only given another shape to entries that stay in their order."""
    return name in RESHAPING and result.numel() == source.numel() and result.dtype == source.dtype


def lost(name: str, origins: Sequence[Origin], kind: str = "plain", rescaled: bool = False) -> Origin:
    """The origin of what a function made of tensors, whose entries are none of a parameter's."""
    names = dict.fromkeys(entry for origin in origins for entry in origin.names)
    steps = dict.fromkeys((*(step for origin in origins for step in origin.steps), name))
    others = tuple(entry for entry in names if entry != origins[0].name)
    rescaled = rescaled or any(origin.rescaled for origin in origins)
    made = origins[0]._replace(layout=None, copied=None, scaled=False, steps=tuple(steps), others=others)
    return made._replace(
        rescaled=rescaled,
        arithmetic=kind != "plain" or any(origin.scaled or origin.arithmetic for origin in origins),
        product=kind in PRODUCTS or any(origin.product for origin in origins),
    )


def of_operation(
    name: str, kind: str, operands: Sequence[Any], result: Tensor, again: Callable[[Tensor, Tensor], Any]
) -> Origin | None:
    """The origin of what an operation made of constants; None if none of them came from a parameter.

    Args:
        name: the function's.
        kind: its kind of operation, ``"plain"`` where it has none.
        operands: what it was given, numbers included.
        result: what it returned.
        again: applies it with one of the tensors replaced by another.
    """
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    found = [(tensor, origin) for tensor in tensors if (origin := marked(tensor)) is not None]
    if not found:
        return None
    origins = [origin for _, origin in found]
    carriers = [
        (tensor, origin) for tensor, origin in found if origin.layout is not None and tensor.shape == result.shape
    ]
    stem = name if name.endswith("__") else name.rstrip("_")
    if kind == "division":
        carriers = [entry for entry in carriers if entry[0] is operands[0]]
    if name in _OWN_NORM or not carriers:
        return lost(name, origins, kind, rescaled=name in _OWN_NORM)
    carrier, origin = carriers[0]
    if kind in ("product", "division"):
        rest = [(tensor, other) for tensor, other in found if tensor is not carrier]
        if any(origin.name in other.names and tensor.numel() > 1 for tensor, other in rest):
            return lost(name, origins, kind, rescaled=True)
        return origin._replace(scaled=True)
    if stem in _CHOOSING:
        fillers = [operand for operand in operands if operand is not carrier and not _is_mask(operand)]
        kept = len(found) == 1 and all(map(_is_zero, fillers))
        return origin._replace(scaled=True) if kept else lost(name, origins, kind)
    elementwise = len(found) == 1 and (kind in ("activation", "power") or stem in _ELEMENTWISE)
    if elementwise and _keeps_zeros(lambda zeros: again(carrier, zeros), carrier):
        return origin._replace(scaled=True)
    return lost(name, origins, kind)


def _is_zero(filler: Any) -> bool:
    """Whether there is nothing but zeros in what is put in an entry's place; of what has no entries, that is assumed."""
    if isinstance(filler, Tensor):
        return not has_data(filler) or not bool(filler.any())
    with on_own_data():
        return not bool(torch.as_tensor(filler).any())


def _keeps_zeros(function: Callable[[Tensor], Any], carrier: Tensor) -> bool:
    """Whether an elementwise function of a constant is zero where that is."""
    if has_data(carrier):
        return keeps_zeros(function, carrier, tuple(carrier.shape))
    try:
        return keeps_zeros(
            function, carrier, (1,) * carrier.dim()
        )  # there is no telling how many entries there would be
    except RuntimeError:
        return False


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool
