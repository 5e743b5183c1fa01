"""Rules for pooling: of an average entries have relevance by their size, of a maximum so as well, or the winner has all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lrp_prune.arguments import check_number
from lrp_prune.engine.call import Call, is_activation
from lrp_prune.engine.precision import as_run_now, without_autocast
from lrp_prune.engine.rule import Rule

Average = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Winner(Rule):
    """Winner takes all: the largest entry of a window has all relevance (Bach et al. 2015). The plain gradient of a maximum."""

    kinds: ClassVar[tuple[str, ...] | None] = ("max_pooling",)


@dataclass(frozen=True)
class Proportional(Rule):
    r"""Entries of a window have relevance by their size: :math:`R_i = x_i / (\sum_i x_i / n + \epsilon) / n \cdot R`.

    Montavon et al. 2019, section 10.3. Of averages it is LRP-epsilon, with 0 the plain gradient; of maxima it takes the place of
    :class:`Winner`. Relevance is conserved where a window's entries do not sum to zero, but for what the stabiliser takes.

    Args:
        stabilizer: what is added to the mean of a window, with its sign (that of 0 is one).

    Example:
        >>> import torch, lrp_prune
        >>> model = torch.nn.Sequential(torch.nn.MaxPool1d(2), torch.nn.Flatten())
        >>> composite = lrp_prune.Composite("shared", {"max_pooling": Proportional()}, base="epsilon")
        >>> with lrp_prune.attributing(model, composite) as propagation:
        ...     value = model(torch.tensor([[[1.0, 3.0]]])).sum()
        ...     propagation.relevance(value)["input"]
        tensor([[[0.7500, 2.2500]]])
    """

    stabilizer: float = 0.0

    kinds: ClassVar[tuple[str, ...] | None] = ("average_pooling", "max_pooling")

    def __post_init__(self) -> None:
        check_number("stabilizer", self.stabilizer, "[0, inf)")

    def __call__(self, call: Call) -> Any:
        x = call.operand(0)
        if not is_activation(x):
            return call.run()
        of_nothing = call.with_operands([None])

        def function(value: Tensor) -> Any:
            return of_nothing.with_operands([value]).run()

        average = function if call.operation.kind == "average_pooling" else _average_of(of_nothing, x)
        return _proportional(x, function, average, self.stabilizer)


def _average_of(call: Call, x: Tensor) -> Average:
    """The mean over the windows that a maximum is taken over; padding is none of their entries' size."""
    name = call.function.__name__
    dims = int(name[name.index("pool") + 4])
    if name.startswith("adaptive"):
        size = call.argument(1, "output_size")
        adaptive: Callable[..., Tensor] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[
            dims - 1
        ]
        return lambda value: adaptive(value, size)
    defaults = {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1}
    given = {key: call.argument(place, key) for place, key in enumerate(defaults, start=1)}
    kernel = _each(given["kernel_size"], dims)
    stride = _each(given["stride"], dims) if given["stride"] not in (None, [], ()) else kernel
    padding, dilation = (
        _each(defaults[key] if given[key] is None else given[key], dims) for key in ("padding", "dilation")
    )
    ceil_mode = bool(call.argument(5, "ceil_mode"))
    convolution: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]

    def average(value: Tensor) -> Tensor:
        rows = value.reshape(-1, 1, *value.shape[-dims:])
        after = []
        for index in range(dims):
            reach, size = dilation[index] * (kernel[index] - 1) + 1, value.shape[value.dim() - dims + index]
            room = size + 2 * padding[index] - reach
            count = room // stride[index] + 1
            if ceil_mode and room % stride[index] and count * stride[index] < size + padding[index]:
                count += 1
            after.append(max((count - 1) * stride[index] + reach - size - padding[index], 0))
        edges = [edge for index in reversed(range(dims)) for edge in (padding[index], after[index])]
        weight = value.new_full((1, 1, *kernel), 1 / torch.Size(kernel).numel())
        made = convolution(F.pad(rows, edges), weight, None, stride, 0, dilation)
        return made.reshape(*value.shape[:-dims], *made.shape[-dims:])

    return average


def _each(value: Any, dims: int) -> list[int]:
    entries = [value] if isinstance(value, int) else list(value)
    return entries * dims if len(entries) == 1 else entries


class _Proportional(Function):
    """Pooling, whose relevance is shared by the average of a window; it is computed once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Any], average: Average, stabilizer: float) -> Any:
        ctx.save_for_backward(x)
        ctx.function, ctx.average = (as_run_now(each, x.device) for each in (function, average))
        ctx.stabilizer = stabilizer
        made = function(x)
        if isinstance(made, tuple):
            ctx.mark_non_differentiable(*made[1:])  # indices
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        with torch._C.DisableTorchFunction(), without_autocast(x.device):
            made = ctx.function(x)
            pooled = made[0] if isinstance(made, tuple) else made
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                mean = ctx.average(leaf)
            total = mean.detach()
            if ctx.stabilizer:
                total = total + torch.copysign(total.new_tensor(ctx.stabilizer), total + 0.0)  # the sign of zero is one
            ratio = (pooled / total).nan_to_num_(0.0, 0.0, 0.0)
            (gradient,) = torch.autograd.grad(mean, leaf, ratio.mul_(d))
        return gradient, None, None, None


_proportional: Callable[..., Any] = _Proportional.apply
winner, proportional = Winner(), Proportional()
