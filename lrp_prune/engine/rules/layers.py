"""A layer as a rule sees it: an affine map of an activation, whose weight is taken in parts."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lrp_prune.engine.forms import Form
from lrp_prune.engine.rules.terms import Constant, Part, power_of_part

Taken = Part | Literal["absolute"] | float
"""What is taken of a weight: a part, the absolute value, or all of it with the negative entries multiplied by a number."""


class Layer:
    """An affine map; what is made of its weight is made once.

    Args:
        form: how activation and weight meet.
        weight: the weight as it is used.
        bias: what is added to the product, in a shape that broadcasts to the output; None for nothing.
        output: product and bias together, where they are known already.
        scale: by what the product is multiplied besides, above zero, in a shape that broadcasts to the output. It is a factor
            of the weight that is left out of it, since weights are often larger than outputs. None for nothing.
    """

    def __init__(
        self,
        form: Form,
        weight: Tensor,
        bias: Tensor | None = None,
        output: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        self.form, self.weight, self.bias, self.output, self.scale = form, weight, bias, output, scale
        self._taken: dict[tuple[Taken, int], Tensor] = {}

    def product(self, values: Tensor, taken: Taken = "whole", power: int = 1) -> Tensor:
        """Values in the activation's place times a power of what is taken of the weight."""
        product = self.form.product(values, self._weight(taken, power))
        return product if self.scale is None else product * self.scale.pow(power)

    def input_gradient(self, d: Tensor, activation: Tensor, taken: Taken, power: int = 1) -> Tensor:
        """The gradient of the activation of a product with what is taken of the weight."""
        d = d if self.scale is None else d * self.scale.pow(power)
        return self.form.input_gradient(d, activation, self._weight(taken, power))

    def _weight(self, taken: Taken, power: int) -> Tensor:
        if (taken, power) == ("whole", 1):
            return self.weight
        if (taken, power) not in self._taken:
            self._taken[taken, power] = taken_of(self.weight, taken, power)
        return self._taken[taken, power]


def taken_of(tensor: Tensor, taken: Taken, power: int = 1) -> Tensor:
    """A power of what is taken of a weight, or likewise of a bias."""
    if isinstance(taken, float):
        found = F.leaky_relu(tensor, taken)
    elif taken == "absolute":
        found = tensor.abs()
    else:
        return power_of_part(tensor, taken, power)
    return found if power == 1 else found.pow(power)


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
