"""Rules for elementwise functions and for products of activations."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrp_prune.engine import functional
from lrp_prune.engine.call import Call, detached, is_activation
from lrp_prune.engine.rule import Rule
from lrp_prune.engine.rules.scales import share_of_power
from lrp_prune.engine.tags import is_gate, is_statistic


@dataclass(frozen=True)
class Identity(Rule):
    """Relevance out = relevance in (AttnLRP, eq. 9): the gradient becomes f(x)/x, and 0 where x is 0."""

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
        if not is_activation(x) or call.function.__name__.startswith("rrelu"):
            return call.run()  # a random slope is f(x)/x already, and must not be drawn again
        if others and isinstance(others[0], int | float):
            # Of a power f(x)/x is the plain gradient over the exponent, and nothing has to be kept.
            return call.with_operands([functional.scaled_gradient(x, 1 / others[0]), *others]).run()
        rest = [detached(other) for other in others]
        of_nothing = call.with_operands([None, *rest])  # the function is kept for backward, and must not hold x

        def function(value: Tensor) -> Tensor:
            result: Tensor = of_nothing.with_operands([value, *rest]).run()
            return result

        return functional.identity_rule(x, function, call.kept)


@dataclass(frozen=True)
class Shares(Rule):
    """Relevance in equal shares to all factors (AttnLRP, prop. 3.2 and 3.3): each side's gradient is halved.

    A statistic is no factor, but scales the other one, which keeps all. Of ``prod`` and ``cumprod``, products of n entries,
    each gets one n-th.

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
        values = _without_statistics(call.operands())
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
        return share_of_power(call) if len(call.operands()) == 2 else share_of_factors(call)


def _without_statistics(values: list[Any]) -> list[Any]:
    """The factors, with statistics detached where something else is a factor."""
    active = [value for value in values if is_activation(value)]
    if len(active) < 2 or not 0 < sum(map(is_statistic, active)) < len(active):
        return values
    return [detached(value) if is_statistic(value) else value for value in values]


def share_of_factors(call: Call) -> Any:
    """``prod`` and ``cumprod`` are products of n entries, each of which gets one n-th (AttnLRP, prop. 3.2)."""
    x, dim = call.operand(0), call.argument(1, "dim")
    if call.function.__name__ == "prod":
        factors = x.numel() if dim is None else x.shape[dim]
        return call.with_operands([functional.scaled_gradient(x, 1 / max(factors, 1))]).run()
    counts = torch.arange(1, x.shape[dim] + 1, device=x.device, dtype=x.dtype)
    per_entry = counts.reshape([-1 if axis == dim % x.dim() else 1 for axis in range(x.dim())])
    return functional.affine(call.run(), Tensor.clone, per_entry.reciprocal())


identity, uniform, stop_gate = Identity(), Shares(), Shares(gates=False)
