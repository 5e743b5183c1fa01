"""Custom autograd functions whose forward is made of torch's functions have the rules of what is in them; others stay closed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

import lrp_prune
from lrp_prune.attribution import UnruledOperationError
from lrp_prune.engine.opened import is_open, writes
from tests.support.small_models import Single

SCALE = 3


class BoundedRoot(Function):
    """A square root whose slope is bounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sqrt(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / torch.sqrt(torch.clip(4.0 * ctx.saved_tensors[0], min=1e-6))


class HandingOn(Function):
    """Comes with the gradient of the identity."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class StraightThrough(HandingOn):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x * SCALE)


class Reversed(Function):
    """The identity, whose gradient is turned around."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class MaskedSoftmax(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(x.masked_fill(~mask, torch.finfo(x.dtype).min), -1).masked_fill_(~mask, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        raise AssertionError("never run")


class Step(HandingOn):
    """Has no gradient of its own, but one that it comes with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 1).to(x.dtype)


class NewStyle(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x


def _of_ones_own(x: Tensor) -> Tensor:
    return x * 2


class CallsOthers(HandingOn):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _of_ones_own(x)


class CallsAnOperator(HandingOn):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.ops.aten.mul(x, 2)


class WritesInto(HandingOn):
    """Torch refuses it where there are gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.sigmoid(x)
        return torch.mul(y, 2, out=y)


class Communicates(HandingOn):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        torch.distributed.all_reduce(x)
        return x


def _explained(function: Callable[[Tensor], Tensor], composite: str) -> tuple[Tensor, Tensor]:
    x = torch.linspace(0.2, 2.0, 12).view(3, 4)
    with lrp_prune.attributing(model := Single(function), composite, unruled="error") as propagation:
        output = model(x)
        assert torch.equal(output, function(x))
        return output.detach(), propagation.relevance(output.sum())["x"]


@pytest.mark.parametrize("composite", ["attnlrp", "cp_lrp"])
@pytest.mark.parametrize("function", [BoundedRoot, StraightThrough, Reversed])
def test_what_is_in_a_custom_function_has_its_rules(function: type[Function], composite: str) -> None:
    """Roots and roundings hand on what they are, whatever gradient they come with."""
    output, relevance = _explained(function.apply, composite)
    torch.testing.assert_close(relevance, output)


def test_a_root_that_divides_is_a_statistic_also_within_a_function_of_its_own() -> None:
    output, relevance = _explained(lambda x: x * BoundedRoot.apply(x.square().mean(-1, keepdim=True)), "attnlrp")
    torch.testing.assert_close(relevance, output)


def test_the_plain_gradient_is_the_function_s_own() -> None:
    output, relevance = _explained(Reversed.apply, "gradient")
    torch.testing.assert_close(relevance, -output)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = NewStyle.apply(x, self.weight)
        return result


def test_weights_in_a_custom_function_are_scored() -> None:
    model, x = Layer(), torch.randn(5, 4)
    relevance = lrp_prune.attribute(
        model, [x], target=lambda model, x: model(x).sum(), statistic="signed", matmul_dtype=None
    )
    torch.testing.assert_close(relevance["weight"], model.weight.detach() * x.sum(0) / 5)


def test_a_softmax_in_a_custom_function_is_a_pattern() -> None:
    def attention(x: Tensor) -> Tensor:
        return MaskedSoftmax.apply(x @ x.T, torch.ones(3, 3, dtype=torch.bool).tril()) @ x

    output, relevance = _explained(attention, "cp_lrp")
    torch.testing.assert_close(relevance.sum(), output.sum())
    x = torch.linspace(0.2, 2.0, 12).view(3, 4)
    pattern = torch.softmax((x @ x.T).masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -torch.inf), -1)
    torch.testing.assert_close(relevance, pattern.sum(0)[:, None] * x)


class Assigned(HandingOn):
    """Writes where a backward of what it is made of would read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        y = torch.softmax(x, -1)
        y[~mask] = 0.0
        return y


class Multiplied(HandingOn):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        y = torch.softmax(x, -1)
        y *= mask
        return y


class ByAnArgument(HandingOn):
    """Writes by a function that is told to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        y = torch.softmax(x, -1)
        return nn.functional.threshold(y, 0.3, 0.0, inplace=True)


@pytest.mark.parametrize("function", [MaskedSoftmax, Assigned, Multiplied, ByAnArgument])
def test_what_a_custom_function_writes_over_is_kept_for_the_backward_pass(function: type[Function]) -> None:
    mask = torch.ones(3, 4, dtype=torch.bool).tril()

    def pattern(x: Tensor) -> Tensor:
        if function is ByAnArgument:
            return nn.functional.threshold(torch.softmax(x, -1), 0.3, 0.0)
        if function in (Assigned, Multiplied):
            return torch.softmax(x, -1) * mask
        return torch.softmax(x.masked_fill(~mask, torch.finfo(x.dtype).min), -1) * mask

    assert writes(function)
    output, relevance = _explained(lambda x: function.apply(x, mask) @ torch.arange(4.0), "attnlrp")
    expected = _explained(lambda x: pattern(x) @ torch.arange(4.0), "attnlrp")[1]
    assert bool(output.any()) and bool(relevance.any())
    torch.testing.assert_close(relevance, expected)


def test_what_writes_nothing_keeps_no_copies() -> None:
    assert not any(map(writes, (BoundedRoot, StraightThrough, Reversed, NewStyle)))


@pytest.mark.parametrize("function", [CallsOthers, CallsAnOperator, WritesInto, Step])
def test_what_calls_more_than_torch_stays_closed_and_is_named(function: type[Function]) -> None:
    with pytest.raises(UnruledOperationError, match=function.__name__):
        _explained(function.apply, "attnlrp")


def test_which_functions_are_open() -> None:
    assert all(map(is_open, (BoundedRoot, StraightThrough, Reversed, NewStyle)))
    assert not any(map(is_open, (CallsOthers, CallsAnOperator, WritesInto, Communicates)))


def test_functions_are_applied_as_ever_outside_of_the_forward_and_when_the_context_is_left() -> None:
    x = torch.ones(2, requires_grad=True)
    model = Single(torch.relu)
    with pytest.raises(RuntimeError, match="inside"), lrp_prune.attributing(model), lrp_prune.attributing(model):
        assert torch.equal(torch.autograd.grad(Reversed.apply(x).sum(), x)[0], -torch.ones(2))
        raise RuntimeError("inside")
    assert torch.equal(torch.autograd.grad(Reversed.apply(x).sum(), x)[0], -torch.ones(2))
    assert not any(
        "apply" in vars(base) for base in Function.__mro__[1:] if base.__module__.startswith("torch.autograd")
    )
