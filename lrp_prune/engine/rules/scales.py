"""Statistics, powers, and divisions: what scales an activation, and what is a feature like any other.

A square root, a norm, a deviation or a reciprocal normalises something where it divides or multiplies an activation, and is a
constant there (AttnLRP, prop. 3.4). Elsewhere, as the length of a vector or a signed square root, it is a feature, and its
relevance goes on to what it was computed from.

The same goes for matrices: the solution of :math:`A X = B` is :math:`B` divided by :math:`A`. It is linear in :math:`B`, which
has all relevance if :math:`A` is a constant; as a factor :math:`A` would have minus as much, as it is homogeneous of degree -1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lrp_prune.engine import functional
from lrp_prune.engine.call import Call, detached, is_activation
from lrp_prune.engine.rule import Rule
from lrp_prune.engine.tags import Tag, set_tag

_STATISTIC = Tag(statistic=True)
_ELEMENTWISE = frozenset({"sqrt", "rsqrt", "reciprocal", "pow"})
_WITH_MEAN = frozenset({"var_mean", "std_mean"})
_DEGREES = {
    "var": 2.0,
    **dict.fromkeys(("cholesky", "linalg_cholesky", "linalg_cholesky_ex"), 0.5),
    **dict.fromkeys(("inverse", "linalg_inv", "linalg_inv_ex", "linalg_pinv"), -1.0),
    **dict.fromkeys(("linalg_solve", "linalg_solve_ex", "linalg_solve_triangular", "triangular_solve"), -1.0),
    "cholesky_solve": -2.0,
}
"""Of what degree functions are that are homogeneous, but not of degree one; of equations in the matrix."""


@dataclass(frozen=True)
class Scale(Rule):
    """A statistic: a constant where it divides or multiplies an activation, elsewhere a feature that hands relevance on.

    All of them are homogeneous of some degree n, so that the gradient over n conserves (Euler), with 0 where x is 0.
    """

    kinds: ClassVar[tuple[str, ...] | None] = ("statistic",)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"statistics"})

    def __call__(self, call: Call) -> Any:
        x, name = call.operand(0), call.function.__name__
        result: Any
        if name in _ELEMENTWISE:
            result = functional.identity_rule(x, _elementwise(call))
        elif name in _DEGREES:
            result = call.with_operands([functional.scaled_gradient(x, 1 / _DEGREES[name])]).run()
        elif name == "var_mean":  # the mean is linear
            result = (call.with_operands([functional.scaled_gradient(x, 0.5)]).run()[0], call.run()[1])
        else:
            result = call.run()
        set_tag(result[0] if name in _WITH_MEAN else result, _STATISTIC)
        return result


@dataclass(frozen=True)
class PlainScale(Rule):
    """The plain gradient of a statistic; of roots, whose slope at 0 is infinite, 0 there."""

    kinds: ClassVar[tuple[str, ...] | None] = ("statistic",)

    def __call__(self, call: Call) -> Any:
        x, name = call.operand(0), call.function.__name__
        exponent = 0.5 if name == "sqrt" else call.argument(1, "exponent") if name == "pow" else None
        if exponent is None or exponent < 0:
            return call.run()
        return functional.identity_rule(functional.scaled_gradient(x, float(exponent)), _elementwise(call))


@dataclass(frozen=True)
class StopDenominator(Rule):
    """A divisor is a statistic, hence a constant; the dividend keeps the plain gradient.

    The reciprocal of an activation, or a constant divided by one, is a statistic itself: see :class:`Scale`. The positions at
    which a grid is sampled are constants as well, whatever is sampled: where they are counted from means nothing, so that a
    position times its gradient does not either.
    """

    kinds: ClassVar[tuple[str, ...] | None] = ("division",)

    def __call__(self, call: Call) -> Any:
        numerator, denominator = call.operands()
        if is_activation(numerator) or not is_activation(denominator):
            # Also of a system of equations, with the matrix as denominator.
            return call.with_operands([numerator, detached(denominator)]).run()
        if call.function.__name__.startswith("grid_sampler"):
            return call.with_operands([numerator, denominator.detach()]).run()
        stand_in = numerator * functional.identity_rule(denominator, torch.reciprocal)
        result = functional.replaced(stand_in, call.with_operands([numerator, denominator.detach()]).run)
        set_tag(result, _STATISTIC)
        return result


def share_of_power(call: Call) -> Any:
    """``x ** y`` of two activations: half of its relevance to each of them."""
    base, exponent = call.operands()
    shape = (base.detach() + exponent.detach()).shape
    halves = [functional.scaled_gradient(value.expand(shape), 0.5) for value in (base, exponent)]
    constant = [base.detach(), exponent.detach()]
    stand_in = functional.identity_rule(halves[0], lambda value: value.pow(constant[1]))
    stand_in = stand_in + functional.identity_rule(halves[1], constant[0].pow)
    return functional.replaced(stand_in, call.with_operands(constant).run)


@dataclass(frozen=True)
class NormPool(Rule):
    """``lp_pool``: homogeneous of degree one, so that its plain gradient conserves under every composite, and 0 where it is 0."""

    def __call__(self, call: Call) -> Any:
        x = call.operand(0)
        if not is_activation(x):
            return call.run()
        norm, size, stride, ceil_mode = (
            call.argument(position, name)
            for position, name in enumerate(("norm_type", "kernel_size", "stride", "ceil_mode"), start=1)
        )
        dimensions = int(call.function.__name__[-2])
        pool: Callable[..., Tensor] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dimensions - 1]
        volume = size**dimensions if isinstance(size, int) else torch.Size(size).numel()
        powers = functional.scaled_gradient(x, 1 / norm).pow(norm)
        sums = pool(powers, size, stride, 0, bool(ceil_mode)) * volume
        stand_in = functional.identity_rule(sums, lambda value: value.pow(1 / norm))
        return functional.replaced(stand_in, call.with_operands([x.detach()]).run)


def _elementwise(call: Call) -> Callable[[Tensor], Tensor]:
    """The call as a function of its first operand, which it does not hold."""
    first, *_ = call.operation.operands
    of_nothing = call.with_arguments({first: None})

    def function(value: Tensor) -> Tensor:
        result: Tensor = of_nothing.with_arguments({first: value}).run()
        return result

    return function


scale, plain_scale, stop_denominator, norm_pool = Scale(), PlainScale(), StopDenominator(), NormPool()
