"""Rules: how one operation hands relevance to its inputs, in gradient x input form.

A rule takes a :class:`Call` and returns the operation's result, built so that the ordinary gradient of the graph, times the
input, is the relevance. Papers: AttnLRP (Achtibat et al. 2024, arXiv 2402.05602), CP-LRP (Ali et al. 2022, arXiv
2202.07304); the gradient form follows Arras et al. 2025 (arXiv 2502.15886).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrp_prune.attribution import functional
from lrp_prune.attribution.operations import Operation
from lrp_prune.attribution.tags import is_gate, is_statistic


class Call(NamedTuple):
    """One call of a torch function inside the model's forward. Parameters among the arguments are detached already."""

    function: Callable[..., Any]
    operation: Operation
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kept: torch.dtype | None = None
    """The precision in which a rule may keep activations for the backward pass; None for their own."""
    module: str = ""
    """The canonical name of the module that runs; empty for the model itself."""

    def run(self) -> Any:
        """Compute the operation as the model asked for it: the plain gradient."""
        return self.function(*self.args, **self.kwargs)

    def argument(self, position: int, name: str) -> Any:
        """An argument's value, given by position or by name; None where the model left it out."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)

    def operand(self, index: int) -> Any:
        """The operand's value; None where the model left it out."""
        return self.argument(*self.operation.operands[index])

    def operands(self) -> list[Any]:
        """All operands in the order of the operation."""
        return [self.operand(index) for index in range(len(self.operation.operands))]

    def with_operands(self, values: Sequence[Any]) -> "Call":
        """The same call with other operands."""
        return self.with_arguments(dict(zip(self.operation.operands, values, strict=True)))

    def with_arguments(self, values: Mapping[tuple[int, str], Any]) -> "Call":
        """The same call with other values of some arguments (position and name), as far as they were given."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for (position, name), value in values.items():
            if position < len(args):
                args[position] = value
            elif name in kwargs:
                kwargs[name] = value
        return self._replace(args=tuple(args), kwargs=kwargs)


Rule = Callable[[Call], Any]


def is_activation(value: Any) -> bool:
    """Whether relevance flows through the value: in the mode every parameter is detached, so what requires grad is one."""
    return isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter)


def detached(value: Any) -> Any:
    """The tensor without its history; other values as they are."""
    return value.detach() if isinstance(value, Tensor) else value


def gradient(call: Call) -> Any:
    """The plain gradient: epsilon -> 0 for linear operations, a Taylor expansion for the others."""
    return call.run()


def stop(call: Call) -> Any:
    """The result is a constant: no relevance goes through."""
    result = call.with_operands([detached(value) for value in call.operands()]).run()
    return type(result)(map(detached, result)) if isinstance(result, tuple | list) else detached(result)


def identity(call: Call) -> Any:
    """Relevance out = relevance in (AttnLRP, eq. 9): the gradient becomes f(x)/x, and 0 where x is 0."""
    x = call.operand(0)
    if not is_activation(x) or call.function.__name__.startswith("rrelu"):
        return call.run()  # a random slope is f(x)/x already, and must not be drawn again
    rest = [detached(other) for other in call.operands()[1:]]
    of_nothing = call.with_operands([None, *rest])  # the function is kept for backward, and must not hold x

    def function(value: Tensor) -> Tensor:
        result: Tensor = of_nothing.with_operands([value, *rest]).run()
        return result

    return functional.identity_rule(x, function, call.kept)


def uniform(call: Call) -> Any:
    """Relevance in equal shares to all factors (AttnLRP, prop. 3.2 and 3.3): each side's gradient is halved.

    A statistic is no factor, but scales the other one, which keeps all.
    """
    values = _without_statistics(call.operands())
    active = [index for index, value in enumerate(values) if is_activation(value)]
    if len(active) > 1:
        for index in active:
            values[index] = functional.scaled_gradient(values[index], 1 / len(active))
    return call.with_operands(values).run()


def stop_gate(call: Call) -> Any:
    """All relevance to the gated side (CP-LRP): the side that comes out of an activation function is a constant.

    Where both sides or neither do, nothing tells which is the gate, and they share equally; that conserves as well.
    """
    values = _without_statistics(call.operands())
    gates = [is_activation(value) and is_gate(value) for value in values]
    if sum(map(is_activation, values)) == 2 and sum(gates) == 1:
        return call.with_operands(
            [detached(value) if gate else value for value, gate in zip(values, gates, strict=True)]
        ).run()
    return uniform(call.with_operands(values))


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


def attention_uniform(call: Call) -> Any:
    """Scaled dot-product attention as two halved products (AttnLRP, prop. 3.3): q and k by 1/4, a learned bias and v by 1/2."""

    def scaled(value: Any, factor: float) -> Any:
        return functional.scaled_gradient(value, factor) if is_activation(value) else value

    operands = [scaled(value, factor) for value, factor in zip(call.operands(), (0.25, 0.25, 0.5), strict=True)]
    return _attention(call, operands, lambda bias: scaled(bias, 0.5))


def attention_to_values(call: Call) -> Any:
    """The attention pattern is a constant (CP-LRP): all relevance to the values."""
    query, key, value = call.operands()
    return _attention(call, [detached(query), detached(key), value], detached)


def attention_gradient(call: Call) -> Any:
    """The plain gradient, without dropout."""
    return _attention(call, call.operands(), lambda bias: bias)


def _attention(call: Call, operands: Sequence[Any], bias: Callable[[Any], Any]) -> Any:
    args, kwargs = list(call.args), dict(call.kwargs)
    if len(args) > 3:
        args[3] = bias(args[3])
    elif "attn_mask" in kwargs:
        kwargs["attn_mask"] = bias(kwargs["attn_mask"])
    if len(args) > 4:
        args[4] = 0.0
    elif "dropout_p" in kwargs:
        kwargs["dropout_p"] = 0.0
    return call._replace(args=tuple(args), kwargs=kwargs).with_operands(operands).run()


def skip(call: Call) -> Any:
    """Dropout is off: the result is the input, and no random number is drawn."""
    return call.operand(0)
