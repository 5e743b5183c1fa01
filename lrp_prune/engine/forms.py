r"""Forms: the shapes in which a weight meets an activation, and what their derivatives are.

Every form is bilinear, :math:`y = B(a, W)`, so that one contraction :math:`G(a, d) = \partial \langle d, B(a, W) \rangle /
\partial W` gives all statistics: signed relevance from :math:`G(a, d)`, absolute from :math:`G(|a|, |d|)`, squared from
:math:`G(a^2, d^2)`.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lrp_prune.engine.axes import axes_of, shared_axes
from lrp_prune.engine.call import Call
from lrp_prune.engine.operations import Place
from lrp_prune.engine.origins import marked
from lrp_prune.engine.saved import with_all


class Form:
    """Any bilinear function, through autograd of the function itself; it costs one more forward.

    Args:
        call: the call; its operands ``activation`` and ``weight`` are given by index.
        activation: index of the activation among the operands.
        weight: index of the weight.
    """

    channel_dim: int | None = None
    """Dimension of the activation along which it has channels, where every channel meets one slice of the weight."""
    in_axis = out_axis = -1
    """Axis of the weight that the activation's channels, and the output's, lie along."""
    only_shows_activation = False
    """Whether the gradient of the activation can be told without the activation."""

    def __init__(self, call: Call, activation: int, weight: int) -> None:
        self.call, self._activation, self._weight = call, activation, weight

    def axes(self) -> tuple[int, int] | None:
        """Axes of the weight along the output's channels and along the activation's; None where it has not one of each."""
        if self.channel_dim is not None:
            return self.out_axis, self.in_axis
        return axes_of(self.call, self._activation, self._weight)

    def shared(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Axes of the activation that the weight has as well, and the weight's own of the same; None where that is not known."""
        return shared_axes(self.call, self._activation, self._weight)

    def forward(self, activation: Tensor, weight: Tensor) -> Tensor:
        """The operation, exactly as the model called it."""
        operands = self.call.operands()
        if not torch.is_grad_enabled():
            weight = as_in_the_model(activation, weight, self._activation)
        operands[self._activation], operands[self._weight] = activation, weight
        result: Tensor = self.call.with_operands(operands).run()
        return result

    def product(self, activation: Tensor, weight: Tensor) -> Tensor:
        """The operation, without what is added to the product, in the activation's precision.

        In the backward pass no autocast brings tensors together, and the activation may have been kept in another precision.
        """
        weight = weight.to(activation.dtype)
        place, summand = self._added()
        if place is None or summand is None:
            return self.forward(activation, weight)
        nothing = None if place[1] == "bias" else torch.zeros_like(summand, dtype=activation.dtype)
        return self._adding(place, nothing).forward(activation, weight)

    def bias(self, activation: Tensor, weight: Tensor) -> Tensor | None:
        """What is added to the product, in a shape that broadcasts to the output; None where nothing is."""
        place, summand = self._added()
        if place is None or summand is None:
            return None
        return self._adding(place, summand.to(activation.dtype)).forward(
            torch.zeros_like(activation), weight.to(activation.dtype)
        )

    def _added(self) -> tuple[Place | None, Any]:
        place = self.call.operation.added
        return place, None if place is None else self.call.argument(*place)

    def _adding(self, place: Place, value: Tensor | None) -> "Form":
        return type(self)(self.call.with_arguments({place: value}), self._activation, self._weight)

    def input_gradient(self, d: Tensor, activation: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the activation, which may be changed in place."""
        with torch.enable_grad(), with_all():
            leaf = activation.detach().requires_grad_()
            result = self.product(leaf, weight)
            (gradient,) = torch.autograd.grad(result, leaf, d.to(result.dtype))
        # Of entries that are only added up it is one number in many places.
        return gradient.contiguous() if 0 in gradient.stride() else gradient

    def contract(self, activation: Tensor, d: Tensor, weight: Tensor) -> Tensor:
        """``G(activation, d)``, in the shape of the weight."""
        with torch.enable_grad(), with_all():
            # In the precision of what is contracted: squares do not fit into the weights' float16.
            leaf = torch.zeros_like(weight, dtype=activation.dtype).requires_grad_()
            result = self.product(activation, leaf)
            (gradient,) = torch.autograd.grad(result, leaf, d.to(result.dtype))
        return gradient


def as_in_the_model(activation: Tensor, weight: Tensor, place: int) -> Tensor:
    """The weight, requiring a gradient if the model's does and that tells how torch multiplies it, in the last bit.

    An activation of several dimensions is seen as one matrix, or else as many; of one that does not lie in memory as it would by
    default, the weight's need of a gradient decides.

    Args:
        activation: what it multiplies.
        weight: without a history.
        place: which operand the activation is.
    """
    if activation.dim() < 3 or weight.dim() > 2 or (place == 0 and activation.is_contiguous()):
        return weight
    origin = marked(weight)
    return weight.detach().requires_grad_() if origin is not None and origin.trained else weight


class Linear(Form):
    """``y = a W^T``: ``F.linear``, weight ``[out, in]``."""

    channel_dim = -1
    out_axis, in_axis = 0, 1
    only_shows_activation = True

    def bias(self, activation: Tensor, weight: Tensor) -> Tensor | None:
        _, summand = self._added()
        return None if summand is None else summand.to(activation.dtype)

    def input_gradient(self, d: Tensor, activation: Tensor, weight: Tensor) -> Tensor:
        return torch.matmul(d, weight.to(d.dtype))

    def contract(self, activation: Tensor, d: Tensor, weight: Tensor) -> Tensor:
        return d.reshape(-1, d.shape[-1]).T @ activation.reshape(-1, activation.shape[-1])


class Matmul(Form):
    """``y = a W``: ``matmul``, ``mm``, ``addmm``, weight ``[in, out]``."""

    channel_dim = -1
    out_axis, in_axis = 1, 0
    only_shows_activation = True

    def input_gradient(self, d: Tensor, activation: Tensor, weight: Tensor) -> Tensor:
        return torch.matmul(d, weight.to(d.dtype).T)

    def contract(self, activation: Tensor, d: Tensor, weight: Tensor) -> Tensor:
        return activation.reshape(-1, activation.shape[-1]).T @ d.reshape(-1, d.shape[-1])


class Convolution(Form):
    """Convolutions, weight ``[out, in / groups, ...]``; a token is a position."""

    channel_dim = 1
    out_axis, in_axis = 0, 1
    _transposed = False
    _names: ClassVar[tuple[str, ...]] = ("stride", "padding", "dilation", "groups")
    """The arguments after the bias."""

    def bias(self, activation: Tensor, weight: Tensor) -> Tensor | None:
        _, summand = self._added()
        return None if summand is None else summand.to(activation.dtype).reshape(-1, *(1,) * (weight.dim() - 2))

    def input_gradient(self, d: Tensor, activation: Tensor, weight: Tensor) -> Tensor:
        found = self._backward(d, activation, weight.to(activation.dtype), 0)
        return super().input_gradient(d, activation, weight) if found is None else found

    def contract(self, activation: Tensor, d: Tensor, weight: Tensor) -> Tensor:
        found = self._backward(d, activation, weight.to(activation.dtype), 1)
        return super().contract(activation, d, weight) if found is None else found

    def _backward(self, d: Tensor, activation: Tensor, weight: Tensor, wanted: int) -> Tensor | None:
        """One gradient, without computing the convolution again; None where that takes another way, as without a batch."""
        dims = weight.dim() - 2
        stride, padding, dilation, output_padding = (
            self.numbers(name, dims) for name in ("stride", "padding", "dilation", "output_padding")
        )
        if activation.dim() != weight.dim() or isinstance(padding, str):
            return None
        mask = [index == wanted for index in range(3)]
        geometry = (stride, padding, dilation, self._transposed, output_padding, self.groups)
        result: Tensor = torch.ops.aten.convolution_backward(
            d.to(activation.dtype), activation, weight, None, *geometry, mask
        )[wanted]
        return result

    def numbers(self, name: str, dims: int) -> Any:
        """An argument of the call such as ``stride``, with a number for each dimension, or the name of a way to pad."""
        value = self.call.argument(3 + self._names.index(name), name) if name in self._names else None
        if isinstance(value, str):
            return value
        value = _DEFAULTS[name] if value is None else value
        entries = [value] if isinstance(value, int) else list(value)
        return entries * dims if len(entries) == 1 else entries

    @property
    def groups(self) -> int:
        """In how many groups of channels that know nothing of each other it works."""
        groups = self.call.argument(3 + self._names.index("groups"), "groups")
        return 1 if groups is None else int(groups)


class TransposedConvolution(Convolution):
    """Transposed convolutions, weight ``[in, out / groups, ...]``; a token is a position."""

    out_axis, in_axis = 1, 0
    _transposed = True
    _names: ClassVar[tuple[str, ...]] = ("stride", "padding", "output_padding", "groups", "dilation")


_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}


def form_of(call: Call, activation: int, weight: int) -> Form:
    """The form of a call of kind ``matmul`` with one activation and one weight."""
    name = call.function.__name__
    if name.startswith("conv") and (activation, weight) == (0, 1):
        kind = TransposedConvolution if name.startswith("conv_transpose") else Convolution
        return kind(call, activation, weight)
    if (activation, weight) == (0, 1) and call.operand(1).dim() == 2:
        if name == "linear":
            return Linear(call, activation, weight)
        scaled = {"alpha", "beta"} & set(call.kwargs)
        if name in ("matmul", "mm", "addmm") and not scaled:
            return Matmul(call, activation, weight)
    return Form(call, activation, weight)
