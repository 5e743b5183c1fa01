"""Constants that come from parameters: where in a parameter a tensor's entries lie.

Models reach their weights through views (``weight.T``, one expert of a stack) and casts, so a tensor made from
parameters alone carries a mark that says which parameter it came from and, where that is still known, which entry of
the parameter each of its entries is.
"""

from typing import NamedTuple

from torch import Tensor

_MARK = "_lrp_prune_origin"
_SOURCE = "_lrp_prune_source"


class Layout(NamedTuple):
    """Where the entries of a strided tensor lie in memory, relative to the parameter's first entry."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Origin(NamedTuple):
    """A parameter's canonical name and its own layout, and that of a tensor within it; None where that is unknown."""

    name: str
    parameter: Layout
    layout: Layout | None

    def dim(self, axis: int) -> int | None:
        """The parameter's dimension that an axis of the tensor is, where the tensor is the parameter up to a transposition."""
        if self.layout is None or self.layout.offset != 0 or sorted(self.layout.size) != sorted(self.parameter.size):
            return None
        if self.layout == self.parameter:  # also where dimensions of size one have the same stride as another
            return axis % len(self.parameter.size)
        stride = self.layout.stride[axis]
        return self.parameter.stride.index(stride) if stride in self.parameter.stride else None


def origin_of_parameter(name: str, parameter: Tensor) -> Origin:
    """The origin of the whole parameter."""
    layout = Layout(tuple(parameter.size()), tuple(parameter.stride()), 0)
    return Origin(name, layout, layout)


def mark(result: Tensor, origin: Origin) -> None:
    """Attach an origin; the mark lives and dies with the Python object of an intermediate tensor."""
    setattr(result, _MARK, origin)


def marked(tensor: Tensor) -> Origin | None:
    """The origin that was attached, if any."""
    return getattr(tensor, _MARK, None)


def note_source(result: Tensor, origin: Origin) -> None:
    """Remember what a constant was computed from: it is no part of the parameter, but made of it."""
    setattr(result, _SOURCE, origin)


def source_of(tensor: Tensor) -> Origin | None:
    """The parameter that a constant is a part of, or was computed from."""
    return marked(tensor) or getattr(tensor, _SOURCE, None)


def derive(origin: Origin, source: Tensor, result: Tensor, elementwise: bool) -> Origin:
    """The origin of ``result``, computed from ``source`` (and constants) whose origin is given.

    A view shares the storage, so its place is its place in the storage; a cast or copy of the same shape keeps the place
    of its source; of anything else only the name is known.
    """
    if origin.layout is None:
        return origin
    if result.untyped_storage()._cdata == source.untyped_storage()._cdata and result.dtype == source.dtype:
        offset = int(result.storage_offset() - source.storage_offset()) + origin.layout.offset
        return origin._replace(layout=Layout(tuple(result.size()), tuple(result.stride()), offset))
    if elementwise and result.shape == source.shape:
        return origin
    return origin._replace(layout=None)


def hand_on(source: Tensor, result: Tensor, elementwise: bool) -> None:
    """Let ``result``, moved or selected from ``source``, have its origin, or what it was computed from."""
    origin = marked(source)
    if origin is not None:
        mark(result, derive(origin, source, result, elementwise))
        return
    computed_from = source_of(source)
    if computed_from is not None:
        note_source(result, computed_from)
