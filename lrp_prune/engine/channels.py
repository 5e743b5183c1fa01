"""Channels: along which axes layers have them, and by which entries of weights and parameters they are read and written."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lrp_prune.engine.forms import Convolution, Form, TransposedConvolution
from lrp_prune.engine.origins import Origin
from lrp_prune.engine.shadow import NOTHING

_LARGEST_TABLE = 1 << 26
"""Entries of a parameter up to which a part of it that is no run of its rows is told apart entry by entry."""


def channel_axis(form: Form, weight: Tensor, tensor: Tensor) -> int | None:
    """The axis of a layer's input or output along which it has channels."""
    if isinstance(form, Convolution):
        return tensor.dim() - (weight.dim() - 1)  # there may be no dimension of samples
    return form.channel_dim


def read_axes(form: Form, weight: Tensor, tensor: Tensor) -> tuple[int, ...] | None:
    """The axes of a layer's input by which its weight reads it: one of channels, or those of heads and of what each of them has.

    Returns:
        None where a weight reads more than it has axes for, or nothing tells.
    """
    axis = channel_axis(form, weight, tensor)
    if axis is not None:
        return (axis,)
    shared = form.shared()
    return None if shared is None else shared[0]


def channels_last(form: Form, weight: Tensor, tensor: Tensor) -> Tensor:
    """A layer's input ``[..., channels]``, of which a weight that has :func:`read_axes` reads each by entries of its own."""
    axes = read_axes(form, weight, tensor)
    assert axes is not None
    return tensor.movedim(axes, tuple(range(-len(axes), 0))).flatten(-len(axes))


def passes_channels(form: Form, weight: Tensor) -> bool:
    """Whether each output channel of a convolution is made of the input channel of the same number, and of no other."""
    return isinstance(form, Convolution) and form.groups > 1 and form.groups == weight.shape[0] and weight.shape[1] == 1


def by_weight(form: Form, weight: Tensor, channels: Tensor, reading: bool) -> Tensor:
    """What is known of each channel that a layer reads, or writes, for each entry of its weight.

    Args:
        form: the layer's.
        weight: the layer's.
        channels: ``[channels]``.
        reading: of its input, else of its output.

    Returns:
        A tensor that broadcasts to the weight.
    """
    transposed = isinstance(form, TransposedConvolution)
    if isinstance(form, Convolution) and reading != transposed:
        # The axis has the channels of one group, and the other axis tells which group that is.
        rows, width = weight.shape[:2]
        table = channels.reshape(form.groups, 1, width).expand(-1, rows // form.groups, -1).reshape(rows, width)
        return (table[:1] if form.groups == 1 else table).reshape(-1, width, *(1,) * (weight.dim() - 2))
    shared = form.shared() if reading and form.channel_dim is None else None
    axes = (form.in_axis if reading else form.out_axis,) if shared is None else shared[1]
    return _along(channels, axes, weight)


def by_activation(form: Form, weight: Tensor, channels: Tensor, activation: Tensor) -> Tensor:
    """What is known of each channel that a layer reads, in a shape that broadcasts to its input."""
    axes = read_axes(form, weight, activation)
    assert axes is not None
    return _along(channels, axes, activation)


def _along(channels: Tensor, axes: Sequence[int], tensor: Tensor) -> Tensor:
    """Values of channels along the axes of a tensor that these are, in a shape that broadcasts to it."""
    dims = [axis % tensor.dim() for axis in axes]
    order = sorted(range(len(dims)), key=dims.__getitem__)
    shape = [size if dim in dims else 1 for dim, size in enumerate(tensor.shape)]
    return channels.reshape([tensor.shape[dim] for dim in dims]).permute(order).reshape(shape)


def on_parameter(numbers: Tensor, origin: Origin) -> Tensor | None:
    """Numbers in the shape of a view of a parameter, in a shape that broadcasts to the parameter itself."""
    layout, whole = origin.layout, origin.parameter
    assert layout is not None
    if layout == whole:
        return numbers
    if (
        layout.offset == 0
        and sorted(layout.size) == sorted(whole.size)
        and sorted(layout.stride) == sorted(whole.stride)
    ):
        axes = [layout.stride.index(stride) for stride in whole.stride]
        if len(set(axes)) == len(axes):
            return numbers.permute(axes)
    if math.prod(whole.size) > _LARGEST_TABLE:
        return None
    table = torch.full((), NOTHING, dtype=torch.int32, device="cpu").expand(whole.size).contiguous()
    strided = torch.empty_strided(whole.size, whole.stride, dtype=torch.int32, device="cpu").copy_(table)
    strided.as_strided(layout.size, layout.stride, layout.offset).copy_(numbers.expand(layout.size))
    for axis in range(strided.dim()):
        first = strided.narrow(axis, 0, 1)
        if bool((strided == first).all()):
            strided = first
    return strided
