"""The gradients that forms of convolutions compute are autograd's, however the function was called."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from lrp_prune.engine.call import Call
from lrp_prune.engine.forms import Convolution, Form, form_of
from lrp_prune.engine.operations import OPERATIONS

CALLS: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = {
    "defaults": (F.conv1d, (2, 4, 7), (3, 4, 2), (), {}),
    "by position": (F.conv2d, (2, 4, 7, 6), (6, 2, 3, 2), (None, (2, 1), 1, (1, 2), 2), {}),
    "by name": (F.conv2d, (2, 4, 7, 6), (6, 2, 3, 2), (), {"groups": 2, "dilation": 2, "padding": (1, 2)}),
    "one number in a list": (F.conv3d, (2, 4, 4, 4, 4), (2, 4, 2, 2, 2), (None, [2], [1]), {}),
    "a word for the padding": (F.conv1d, (2, 4, 7), (3, 4, 3), (), {"padding": "same", "dilation": 2}),
    "no batch": (F.conv2d, (4, 5, 5), (3, 4, 3, 3), (None, 2), {}),
    "transposed, by position": (F.conv_transpose2d, (2, 4, 3, 3), (4, 3, 2, 3), (None, 2, 1, (1, 0), 2, (2, 1)), {}),
    "transposed, by name": (
        F.conv_transpose1d,
        (2, 4, 5),
        (4, 2, 3),
        (),
        {"stride": 3, "output_padding": 2, "groups": 4},
    ),
    "transposed, no batch": (F.conv_transpose3d, (4, 2, 3, 2), (4, 2, 2, 2, 2), (), {}),
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("label", CALLS)
def test_gradients_of_a_convolution_are_autograds(label: str, with_bias: bool) -> None:
    function, shape, of_weight, rest, named = CALLS[label]
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(of_weight, dtype=torch.float64)
    z = function(x, weight, *rest, **named)
    if with_bias:
        bias = torch.randn(z.shape[1 if z.dim() == weight.dim() else 0], dtype=torch.float64)
        rest, named = ((bias, *rest[1:]), named) if rest else ((), {**named, "bias": bias})
    call = Call(function, OPERATIONS[function], (None, weight, *rest), named)
    form, d = form_of(call, 0, 1), torch.randn_like(z)
    assert isinstance(form, Convolution)
    general = Form(call, 0, 1)
    torch.testing.assert_close(form.input_gradient(d, x, weight), general.input_gradient(d, x, weight))
    torch.testing.assert_close(form.contract(x, d, weight), general.contract(x, d, weight))
    assert form.groups == ({**named, "groups": 2} if "by position" in label else {"groups": 1, **named})["groups"]


def test_the_precision_is_that_of_the_activation() -> None:
    call = Call(F.conv1d, OPERATIONS[F.conv1d], (None, None), {})
    form, x, weight = form_of(call, 0, 1), torch.randn(2, 3, 6), torch.randn(4, 3, 2, dtype=torch.bfloat16)
    d = torch.randn(2, 4, 5, dtype=torch.bfloat16)
    assert form.input_gradient(d, x, weight).dtype == form.contract(x, d, weight).dtype == torch.float32


class Turned(nn.Module):
    """Multiplies an activation that lies in memory in another order, or a constant that does."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], trained: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(16, 16, dtype=torch.float64), requires_grad=trained)
        self.table = nn.Parameter(torch.randn(1, 5, 16, dtype=torch.float64))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        turned = x.transpose(1, 2)
        return self.function(turned, self.weight) + self.function(self.table.expand(2, -1, -1), self.weight).sum()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("function", [F.linear, torch.matmul, lambda x, weight: weight @ x.mT])
def test_the_last_bit_does_not_depend_on_how_an_activation_lies_in_memory(
    function: Callable[[Tensor, Tensor], Tensor], trained: bool
) -> None:
    """Whether torch multiplies it as one matrix or as many is told by whether the weight requires a gradient."""
    model, x = Turned(function, trained), torch.randn(2, 16, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    with lrp_prune.attributing(model, "cp_lrp"):
        assert torch.equal(model(x), expected)
    seen: list[Tensor] = []

    def target(model: nn.Module, x: Tensor) -> Tensor:
        seen.append(model(x))
        return seen[0].sum()

    lrp_prune.attribute(model, [x], target, "attnlrp", include=["weight"])
    assert torch.equal(seen[0], expected)
