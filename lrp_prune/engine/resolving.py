"""What a call is: the kind of operations whose operands tell which of several they are."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lrp_prune.engine.call import Call, is_activation
from lrp_prune.engine.operations import Operation


def _of_kind(call: Call, kind: str) -> Call:
    return call if call.operation.kind == kind else call._replace(operation=call.operation._replace(kind=kind))


def _power(call: Call) -> Call:
    """``x ** n``: an activation of what is one, for a number n < 1 a statistic, a product of factors if both are one."""
    base, exponent = call.operands()
    if is_activation(base) and is_activation(exponent):
        return _of_kind(call, "factors")
    if not isinstance(exponent, Tensor):
        return _of_kind(call, "plain" if exponent == 0 else "statistic" if exponent < 1 else "activation")
    index = 1 if is_activation(exponent) else 0
    if isinstance(base, Tensor):  # one exponent for each entry
        shape = (base.detach() + exponent.detach()).shape
        call = call.with_operands([base.expand(shape), exponent.expand(shape)])
    operands = (call.operation.operands[index],)
    return call._replace(operation=call.operation._replace(kind="activation", operands=operands))


def _einsum(call: Call) -> Call:
    """A contraction is a product of matrices, with its tensors as operands, given one by one or as a list."""
    tensors = call.args[1:]
    if len(tensors) == 1 and isinstance(tensors[0], tuple | list):
        tensors = tuple(tensors[0])
    operands = tuple((index + 1, f"operand{index}") for index in range(len(tensors)))
    if len(tensors) == 1:  # a sum, a diagonal, another order
        return call._replace(operation=Operation("plain", operands), args=(call.args[0], *tensors))
    return _contraction(call._replace(operation=Operation("matmul", operands), args=(call.args[0], *tensors)))


def _contraction(call: Call) -> Call:
    """Of two activations a product of matrices; of one, a linear layer, whichever function computes it."""
    if sum(map(is_activation, call.operands())) > 1:
        return _of_kind(call, "matmul")
    return _of_kind(call, "convolution" if call.operation.kind == "convolution" else "linear")


def _clip(call: Call) -> Call:
    """An activation that is no gate; with bounds that are tensors it picks entries."""
    bounded = any(isinstance(call.argument(*place), Tensor) for place in call.operation.data[1:])
    return _of_kind(call, "plain" if bounded else "activation")


def _solution(call: Call) -> Call:
    """``A X = B``: a division by the matrix; where that alone is an activation, a statistic, as the reciprocal of one is."""
    right, matrix = call.operation.operands
    if is_activation(call.argument(*right)):
        return _of_kind(call, "division")
    return call._replace(operation=call.operation._replace(kind="statistic", operands=(matrix,)))


def _reduction(call: Call) -> Call:
    """A product of what meets at one place is one of factors; sums, means and extremes have their plain gradient."""
    return _of_kind(call, "factors" if call.argument(4, "reduce") == "prod" else "plain")


RESOLVERS: dict[str, Callable[[Call], Call]] = {
    "power": _power,
    "einsum": _einsum,
    "matmul": _contraction,
    "linear": _contraction,
    "convolution": _contraction,
    "clip": _clip,
    "solution": _solution,
    "reduction": _reduction,
}
"""Kind of a row -> what a call of it is."""


def resolved(call: Call) -> Call:
    """The call with the kind that its operands tell."""
    resolver = RESOLVERS.get(call.operation.kind)
    return call if resolver is None else resolver(call)


def written_by(function: Any) -> bool:
    """Whether a function writes into its first operand, and has no twin that does not."""
    return getattr(function, "__name__", "") in ("__setitem__", "copy_")
