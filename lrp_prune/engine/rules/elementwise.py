"""Rules for elementwise functions and for products of activations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrp_prune.engine import functional
from lrp_prune.engine.call import Call, detached, is_activation
from lrp_prune.engine.rule import Rule
from lrp_prune.engine.rules.scales import share_of_power
from lrp_prune.engine.tags import DECAYS, Tag, is_decay, is_gate, is_statistic, set_tag
from lrp_prune.without_data import keeps_zeros

_ZERO_AT_ZERO = frozenset(
    "relu gelu silu tanh elu selu celu leaky_relu relu6 hardswish mish softsign prelu erf sin square sign".split()
)
"""Functions of which that need not be tried."""


@dataclass(frozen=True)
class Identity(Rule):
    """Relevance out = relevance in (AttnLRP, eq. 9): the gradient becomes f(x)/x, and 0 where x is 0.

    Where x is 0 and f(x) is not, as of a sigmoid, relevance is a constant's: see :class:`~lrp_prune.engine.constants.Constants`.
    """

    kinds: ClassVar[tuple[str, ...] | None] = (
        "activation",
        "softmax",
        "normalization",
        "statistic",
        "division",
        "dropout",
    )
    scores_weights: ClassVar[bool] = False

    def __call__(self, call: Call) -> Any:
        x, *others = call.operands()
        name = call.function.__name__
        if not is_activation(x) or name.startswith("rrelu") or call.operation.channels == "reduced":
            return call.run()  # a random slope is f(x)/x already, and must not be drawn again
        if others and isinstance(others[0], int | float):
            # Of a power f(x)/x is the plain gradient over the exponent, and nothing has to be kept.
            return call.with_operands([functional.scaled_gradient(x, 1 / others[0]), *others]).run()
        rest = [detached(other) for other in others]
        of_nothing = call.with_operands([None, *rest])  # the function is kept for backward, and must not hold x

        def function(value: Tensor) -> Tensor:
            result: Tensor = of_nothing.with_operands([value, *rest]).run()
            return result

        if call.absorbing is None or name in _ZERO_AT_ZERO or not _absorbs(function, x):
            result = functional.identity_rule(x, function, call.kept)
        else:
            result = functional.absorbing_identity(x, call.absorbing(x), function)
        if name in DECAYS:
            set_tag(result, Tag(decay=True))
        return result


@dataclass(frozen=True)
class Shares(Rule):
    """Relevance in equal shares to all factors (AttnLRP, prop. 3.2 and 3.3): each side's gradient is halved.

    A statistic is no factor, but scales the other one, which keeps all. Nor is an exponential: it is by how much a state decays
    (MambaLRP, Jafari et al. 2024, arXiv 2406.07592), and if it were one, a state had :math:`2^{-n}` of its
    relevance left n steps before. Of ``prod`` and ``cumprod``, products of n entries, each gets one n-th.

    Args:
        gates: whether gates are factors. Else all relevance goes to the gated side (CP-LRP), and the side that comes out
            of an activation function is a constant. Where both sides or neither do, nothing tells which is the gate, and
            they share equally; that conserves as well.
    """

    gates: bool = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.gates else frozenset({"gates"})

    @property
    def stops(self) -> bool:
        return not self.gates

    def __call__(self, call: Call) -> Any:
        values = _without(is_decay, _without(is_statistic, call.operands()), call.held)
        active = [index for index, value in enumerate(values) if is_activation(value)]
        gates = [] if self.gates else [index for index in active if is_gate(values[index])]
        if len(active) == 2 and len(gates) == 1:
            values[gates[0]] = detached(values[gates[0]])
        elif len(active) > 1:
            for index in active:
                values[index] = functional.scaled_gradient(values[index], 1 / len(active))
        return call.with_operands(values).run()

    @property
    def is_plain_for_one(self) -> bool:
        return True

    def of_factors(self, call: Call) -> Any:
        if call.function.__name__.endswith("_reduce"):
            return share_of_meeting(call)
        return share_of_power(call) if len(call.operands()) == 2 else share_of_factors(call)


def _absorbs(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether a function is not zero at zero; also where that cannot be told from a single entry."""
    try:
        return not keeps_zeros(function, x, (1,) * x.dim())
    except (RuntimeError, TypeError, ValueError, IndexError):
        return True


def _without(
    is_scale: Callable[[Any], bool], values: list[Any], held: Callable[[Tensor], None] | None = None
) -> list[Any]:
    """The factors, with what scales them detached, and told of, where something else is a factor."""
    active = [value for value in values if is_activation(value)]
    if len(active) < 2 or not 0 < sum(map(is_scale, active)) < len(active):
        return values
    for value in active:
        if held is not None and is_scale(value):
            held(value)
    return [detached(value) if is_scale(value) else value for value in values]


def share_of_factors(call: Call) -> Any:
    """``prod`` and ``cumprod`` are products of n entries, each of which gets one n-th (AttnLRP, prop. 3.2)."""
    x, dim = call.operand(0), call.argument(1, "dim")
    if call.function.__name__ == "prod":
        factors = x.numel() if dim is None else x.shape[dim]
        return call.with_operands([functional.scaled_gradient(x, 1 / max(factors, 1))]).run()
    counts = torch.arange(1, x.shape[dim] + 1, device=x.device, dtype=x.dtype)
    per_entry = counts.reshape([-1 if axis == dim % x.dim() else 1 for axis in range(x.dim())])
    return functional.affine(call.run(), Tensor.clone, per_entry.reciprocal())


def share_of_meeting(call: Call) -> Any:
    """``scatter_reduce`` and ``index_reduce`` by products: of each activation that meets others at one place one n-th."""
    own, source = call.operands()
    dim, index, kept = call.argument(1, "dim"), call.argument(2, "index"), call.argument(5, "include_self")
    if index.dim() < source.dim():
        index = index.reshape([-1 if axis == dim % source.dim() else 1 for axis in range(source.dim())]).expand_as(
            source
        )
    counts = torch.zeros_like(own).detach()
    if is_activation(source):
        counts = counts.scatter_add(dim, index, torch.ones_like(source).detach())
    if is_activation(own) and (kept is None or kept):
        counts = counts + 1
    counts = counts.clamp(min=1)
    shares = (counts.reciprocal(), counts.gather(dim, index).reciprocal())
    return call.with_operands(
        [
            functional.affine(value, Tensor.clone, share) if is_activation(value) else value
            for value, share in zip((own, source), shares, strict=True)
        ]
    ).run()


identity, uniform, stop_gate = Identity(), Shares(), Shares(gates=False)
