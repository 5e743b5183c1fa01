"""What a rule computes once more in backward is what the forward computed: under autocast as well."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrp_prune
from lrp_prune.engine import functional
from lrp_prune.engine.rules.softmax import softmax_z_plus

LAYERS = {
    "prelu": nn.PReLU(),
    "prelu by channel": nn.PReLU(8, init=0.1),
    "gelu": nn.GELU(),
    "softplus": nn.Softplus(),
    "softmax": nn.Softmax(1),
    "layer norm": nn.LayerNorm(8),
    "rms norm": nn.RMSNorm(8),
    "group norm": nn.GroupNorm(2, 8),
    "average pooling": nn.AvgPool1d(2, 1, 1, count_include_pad=False),
    "max pooling": nn.MaxPool1d(3, 1, 1),
    "power": nn.LPPool1d(2, 2),
}


@pytest.mark.parametrize("composite", ["epsilon", "attnlrp", "epsilon_gamma"])
@pytest.mark.parametrize("name", LAYERS)
def test_relevance_is_that_without_it_to_its_rounding(name: str, composite: str) -> None:
    torch.manual_seed(0)
    batch = torch.randn(6, 4), torch.randint(3, (6,))
    model = nn.Sequential(nn.Linear(4, 8), LAYERS[name], nn.LazyLinear(3))
    model(batch[0])
    expected = lrp_prune.attribute(model, [batch], composite=composite, statistic="signed")
    with torch.autocast("cpu", torch.bfloat16):
        found = lrp_prune.attribute(model, [batch], composite=composite, statistic="signed")
    for weight, sums in expected.items():
        torch.testing.assert_close(found[weight], sums, rtol=0.03, atol=0.03 * float(sums.abs().max()))


@pytest.mark.parametrize(
    "rule",
    [
        lambda x, f: functional.identity_rule(x, f, None),
        lambda x, f: functional.absorbing_identity(x, torch.ones((), requires_grad=True), f),
        lambda x, f: softmax_z_plus(x, f, -1),
    ],
    ids=["identity", "absorbing", "softmax"],
)
def test_a_function_is_computed_again_as_it_was(rule: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> None:
    """In the types that autocast chose, which is off by then."""
    made, weight = list[torch.dtype](), torch.eye(4)

    def function(x: Tensor) -> Tensor:
        made.append(F.linear(x, weight).dtype)
        return x.softmax(-1)

    x = torch.randn(3, 4, requires_grad=True)
    for enabled, expected in ((True, torch.bfloat16), (False, torch.float32)):
        made.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            result = rule(x, function)
        result.sum().backward()
        assert made and set(made) == {expected}
