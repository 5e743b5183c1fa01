"""Rules for sums of two activations, as of a branch and the residual stream that it is added to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lrp_prune.arguments import check_number
from lrp_prune.engine.call import Call, is_activation
from lrp_prune.engine.rule import Rule

Sharing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_SIGNS = {"add": 1, "sub": -1, "subtract": -1}


@dataclass(frozen=True)
class _Summing(Rule):
    """What hands on the relevance of a sum entry by entry; other sums (with constants) keep the gradient.

    What is broadcast has the shares of all places that it stands in.
    """

    kinds: ClassVar[tuple[str, ...] | None] = ("sum",)

    def shared(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """By what the gradient of the sum is multiplied for each of the summands."""
        raise NotImplementedError

    def __call__(self, call: Call) -> Any:
        values = call.operands()
        sign = _SIGNS.get(call.function.__name__.rstrip("_"))
        if sign is None or not all(map(is_activation, values)):
            return call.run()
        shape = torch.broadcast_tensors(*values)[0].shape  # type: ignore[no-untyped-call]  # torch's
        values = [value if value.shape == shape else value.expand(shape) for value in values]
        alpha = call.kwargs.get("alpha", 1)
        of_nothing = call.with_operands([None, None])
        return _shared(
            *values, lambda one, other: of_nothing.with_operands([one, other]).run(), sign * alpha, self.shared
        )


@dataclass(frozen=True)
class EpsilonSum(_Summing):
    r"""LRP-epsilon for sums: :math:`R_i = x_i / (x_1 + x_2 + \epsilon \, \mathrm{sign}) \, R`; with 0 the plain gradient.

    Bach et al. 2015. Summands that cancel each other out get relevance of either sign, and much of it, which epsilon bounds.

    Example:
        >>> import torch, lrp_prune
        >>> composite = lrp_prune.Composite("damped", {"sum": EpsilonSum(1.0)}, base="epsilon")
        >>> model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> with lrp_prune.attributing(model, composite) as propagation:
        ...     relevance = propagation.relevance(model(torch.randn(1, 3, 8)).sum())
    """

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        check_number("epsilon", self.epsilon, "[0, inf)")

    def shared(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        z = one + other
        total = z + torch.copysign(z.new_tensor(self.epsilon), z + 0.0)  # the sign of zero is one
        ratio = (z / total).nan_to_num_(0.0, 0.0, 0.0)
        return ratio, ratio


@dataclass(frozen=True)
class SizeShares(_Summing):
    r"""Summands have relevance by their size: :math:`R_i = |x_i| / (|x_1| + |x_2|) \, R`, and none of the other sign.

    What a branch and the stream have has then the sign of what their sum has. Relevance is conserved.
    """

    def shared(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        ratio = ((one + other) / (one.abs() + other.abs())).nan_to_num_(0.0, 0.0, 0.0)
        return ratio * one.sign(), ratio * other.sign()


@dataclass(frozen=True)
class EqualShares(_Summing):
    r"""The identity, in equal shares: :math:`R_i = R / 2`, whatever the summands are.

    Relevance is conserved but where a summand is zero, whose half is lost: relevance is the input times a gradient.
    """

    def shared(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        z = (one + other) / 2
        first, second = ((z / value).nan_to_num_(0.0, 0.0, 0.0) for value in (one, other))
        return first, second


class _Shared(Function):
    """A sum by a rule; ``factor`` is by what the second summand is multiplied."""

    @staticmethod
    def forward(
        ctx: Any, one: Tensor, other: Tensor, function: Callable[..., Tensor], factor: float, sharing: Sharing
    ) -> Tensor:
        ctx.save_for_backward(one, other)
        ctx.factor, ctx.sharing = factor, sharing
        return function(one, other)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        one, other = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            first, second = ctx.sharing(one, other * ctx.factor)
            return (d * first).to(one.dtype), (d * second * ctx.factor).to(other.dtype), None, None, None


_shared: Callable[..., Tensor] = _Shared.apply
epsilon_sum, size_shares, equal_shares = EpsilonSum(), SizeShares(), EqualShares()
