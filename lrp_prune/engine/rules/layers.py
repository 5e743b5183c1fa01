"""A layer as a rule sees it: an affine map of an activation, whose weight is taken in parts."""

import torch
from torch import Tensor

from lrp_prune.engine.forms import Form
from lrp_prune.engine.rules.terms import Constant, Part, power_of_part


class Layer:
    """An affine map; what is made of its weight is made once.

    Args:
        form: how activation and weight meet.
        weight: the weight as it is used.
        bias: what is added to the product, in a shape that broadcasts to the output; None for nothing.
        output: product and bias together, where they are known already.
    """

    def __init__(self, form: Form, weight: Tensor, bias: Tensor | None = None, output: Tensor | None = None) -> None:
        self.form, self.weight, self.bias, self.output = form, weight, bias, output
        self._parts: dict[tuple[Part, int], Tensor] = {}

    def part(self, part: Part, power: int = 1) -> Tensor:
        """A power of some of the weight's entries, with zeros for the others."""
        if (part, power) == ("whole", 1):
            return self.weight
        if (part, power) not in self._parts:
            self._parts[part, power] = power_of_part(self.weight, part, power)
        return self._parts[part, power]

    def product(self, values: Tensor, part: Part = "whole", power: int = 1) -> Tensor:
        """Values in the activation's place times a part of the weight."""
        return self.form.product(values, self.part(part, power))

    def input_gradient(self, d: Tensor, activation: Tensor, part: Part, power: int) -> Tensor:
        """The gradient of the activation of a product with a part of the weight."""
        return self.form.input_gradient(d, activation, self.part(part, power))


def constant_like(activation: Tensor, form: Form, constant: Constant, weight_dims: int) -> Tensor:
    """A constant in a shape that broadcasts to the input.

    Raises:
        ValueError: if it is one for each channel, and the input has other channels, or none that can be told.
    """
    if not isinstance(constant, tuple):
        return activation.new_full((1,) * activation.dim(), constant)
    after = 0 if form.channel_dim == -1 else weight_dims - 2
    channels = activation.shape[activation.dim() - 1 - after] if form.channel_dim is not None else None
    if channels != len(constant):
        raise ValueError(
            f"a rule has a constant for each of {len(constant)} channels, and the input has "
            f"{'none that can be told' if channels is None else channels}: give one number, or one for each channel"
        )
    return activation.new_tensor(constant).reshape(-1, *(1,) * after)


def has_negative(activation: Tensor) -> bool:
    """Whether any entry is below zero: after a ReLU half of the work is done."""
    return activation.numel() > 0 and bool(activation.amin() < 0)


def widened(*tensors: Tensor) -> list[Tensor]:
    """The tensors in one precision, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]
