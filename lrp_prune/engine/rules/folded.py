"""Layers that normalisations are folded into: their weights, and what their messages are to the model's own weight."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lrp_prune.engine.forms import Convolution, Form, Linear, Matmul
from lrp_prune.engine.rules.folding import Arrived
from lrp_prune.engine.rules.layers import Layer
from lrp_prune.engine.rules.messages import Message
from lrp_prune.engine.rules.terms import Part


def has_channels(form: Form, tensor: Tensor, weight: Tensor) -> bool:
    """Whether the channels of a layer's input or output are its second dimension, as batch normalisation takes them."""
    if isinstance(form, Convolution):
        return tensor.dim() == weight.dim()
    return isinstance(form, Linear | Matmul) and tensor.dim() == 2


def followed(layer: Layer, arrived: Arrived) -> Layer:
    """The layer with the normalisation after it."""
    form, weight = layer.form, layer.weight
    scale, shift = arrived.scale.to(weight.dtype), arrived.shift.to(weight.dtype)
    shape = (-1, *(1,) * (arrived.y.dim() - 2))
    bias = shift.reshape(shape)
    if layer.bias is not None:
        bias = bias + layer.bias * scale.reshape(shape)
    output = torch.addcmul(shift.reshape(shape), arrived.y.to(weight.dtype), scale.reshape(shape))
    if bool((scale > 0).all()):
        return Layer(form, weight, bias, output, scale.reshape(shape))
    return Layer(form, weight * along(form, weight, scale, form.out_axis), bias, output)


def preceded(layer: Layer, scale: Tensor, shift: Tensor, activation: Tensor) -> Layer:
    """The layer with the normalisation before it."""
    form, weight = layer.form, layer.weight
    scale, shift = scale.to(weight.dtype), shift.to(weight.dtype)
    one = shift.reshape(-1, *(1,) * (activation.dim() - 2)).expand(1, *activation.shape[1:]).contiguous()
    bias = form.product(one, weight)
    if layer.bias is not None:
        bias = bias + layer.bias
    return Layer(form, weight * along(form, weight, scale, form.in_axis), bias, layer.output)


def along(form: Form, weight: Tensor, values: Tensor, axis: int) -> Tensor:
    """A value for each channel in a shape that broadcasts to the weight, whose axis the channels lie along."""
    rest = (1,) * (weight.dim() - 2)
    if axis == 0:
        return values.reshape(-1, 1, *rest)
    groups = form.groups if isinstance(form, Convolution) else 1
    # Of a convolution in groups, each group of the first axis meets other channels.
    by_group = values.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    return by_group.reshape(-1, by_group.shape[-1], *rest) if groups > 1 else values.reshape(1, -1, *rest)


def restated(found: Iterable[Message], outward: Tensor | None, inward: Tensor | None, dims: int) -> list[Message]:
    """Messages to the weight of a folded layer as messages to the model's own.

    Args:
        found: about the folded weight.
        outward: by what the weight was multiplied for each channel of the output; None for nothing.
        inward: by what it was for each channel of the input.
        dims: of input and output.
    """
    shape = (-1, *(1,) * (dims - 2))
    made = list(found)
    if outward is not None:
        made = [
            message._replace(weight=part, d=message.d * values.reshape(shape))
            for message in made
            for part, values in _powers(message, outward.to(message.d.dtype))
        ]
    if inward is not None:
        made = [
            message._replace(weight=part, factor=values.reshape(shape))
            for message in made
            for part, values in _powers(message, inward.to(message.d.dtype))
        ]
    return made


def _powers(message: Message, scale: Tensor) -> list[tuple[Part, Tensor]]:
    """Which part of the own weight a part of the folded one is, and by what that is multiplied."""
    if message.weight == "whole":
        return [("whole", scale.pow(message.power))]
    other: Part = "negative" if message.weight == "positive" else "positive"
    places: list[tuple[Part, Tensor]] = [(message.weight, scale > 0), (other, scale < 0)]
    return [(part, scale.pow(message.power) * where) for part, where in places if bool(where.any())]
