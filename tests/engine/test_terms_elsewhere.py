"""Terms of a rule in units, blocks, recurrent layers, contractions and mixed precision."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Composite
from lrp_prune.attribution import Gamma
from tests.support.written_shares import GAMMA, RULES, gamma_shares


def test_units_and_deeper_layers_follow_the_rule_as_well() -> None:
    """Of two layers, with relevance handed on by the first's outputs; and what enters a layer is what its units have."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    hidden, z = model[0](x).detach(), model(x).detach()
    upper = gamma_shares(hidden.relu()[:, None] * model[2].weight.detach(), torch.zeros(4, 3).double()) * z[..., None]
    of_units = upper.nan_to_num(0).sum(1)
    lower = gamma_shares(x[:, None] * model[0].weight.detach(), torch.zeros(4, 6).double()) * of_units[..., None]
    rules = Composite("gamma", {"linear": Gamma(GAMMA)}, base="epsilon")
    options = {"composite": rules, "statistic": "signed", "matmul_dtype": None}
    weights = lrp_prune.attribute(model, [x], lambda m, b: m(b).sum(), include=["*weight"], **options)
    torch.testing.assert_close(weights["0.weight"].double(), lower.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weights["2.weight"].double(), upper.mean(0), rtol=1e-5, atol=1e-7)
    units = lrp_prune.attribute(model, [x], lambda m, b: m(b).sum(), granularity="neuron", **options)
    torch.testing.assert_close(next(iter(units.values())).double(), of_units.mean(0), rtol=1e-5, atol=1e-7)


def test_blocks_are_found_and_follow_the_rule() -> None:
    """What a layer writes onto a stream, times what comes back to it there."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 6, bias=False), nn.Linear(6, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(x).relu())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5, bias=False), Block(), Block(), nn.Linear(5, 2, bias=False)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    found = {}
    for name, rule in (("plain", "gradient"), ("none", Gamma(0.0)), ("gamma", Gamma(GAMMA))):
        found[name] = lrp_prune.attribute(
            model, [x], lambda m, b: m(b).sum(), Composite(name, {"linear": rule}, base="epsilon"), "signed", "block"
        )
    assert list(found["gamma"]) == list(found["plain"]) and len(found["plain"]) == 2
    stream = model[:3](x).detach()
    written = stream - model[:2](x).detach()
    z = stream @ model[3].weight.detach().T
    shares = gamma_shares(stream[:, None] * model[3].weight.detach(), torch.zeros(4, 2).double())
    of_stream = (shares * z[..., None]).sum(1)
    last = list(found["gamma"])[-1]
    expected = (of_stream / stream * written).sum(1).mean()
    torch.testing.assert_close(found["gamma"][last].double()[0], expected, rtol=1e-4, atol=1e-6)
    for name in found["plain"]:
        torch.testing.assert_close(found["none"][name], found["plain"][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_recurrent_layers_follow_the_rule_in_every_step(kind: str) -> None:
    """What the weights have in all is what reaches the layers' outputs, which is all there is without biases."""
    torch.manual_seed(0)
    layer = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](3, 4, bias=False, batch_first=True).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    found = {}
    for name, rule in (("plain", "gradient"), ("gamma", Gamma(GAMMA)), ("none", Gamma(0.0))):
        found[name] = lrp_prune.attribute(
            layer, [x], lambda m, b: m(b)[0].sum(),
            Composite(name, {"linear": rule}, base="attnlrp"), "signed", matmul_dtype=None,
        )  # fmt: skip
    for name in found["plain"]:
        torch.testing.assert_close(found["none"][name], found["plain"][name])
        assert not torch.allclose(found["gamma"][name], found["plain"][name], rtol=1e-3)
    with lrp_prune.attributing(layer, Composite("gamma", {"linear": Gamma(GAMMA)}, base="attnlrp")) as propagation:
        value = layer(x)[0].sum()
        torch.testing.assert_close(propagation.relevance(value)["input"].sum(), value.detach())
    # Each weight's relevance is that of the products that it makes: of the input weight, all that the input gets.
    of_input = found["gamma"]["weight_ih_l0"].double().sum() * len(x)
    torch.testing.assert_close(of_input, value.detach(), rtol=1e-5, atol=1e-6)


def test_a_recurrent_weight_has_the_relevance_of_the_formula() -> None:
    """Of two steps of tanh(W x + U h), of which only the second has a state before it."""
    torch.manual_seed(0)
    layer = nn.RNN(3, 4, bias=False, batch_first=True).double()
    x = torch.randn(2, 2, 3, dtype=torch.float64)
    before = torch.tanh(x[:, 0] @ layer.weight_ih_l0.T).detach()
    after = (before @ layer.weight_hh_l0.T).detach()
    total = (x[:, 1] @ layer.weight_ih_l0.T).detach() + after
    messages = gamma_shares(before[:, None] * layer.weight_hh_l0.detach(), torch.zeros(2, 4).double())
    messages = messages * (after * total.tanh() / total)[..., None]
    for statistic, expected in (("signed", messages.sum(0) / 2), ("abs_token", messages.abs().sum(0) / 2)):
        relevance = lrp_prune.attribute(
            layer, [x], lambda m, b: m(b)[0][:, -1].sum(), Composite("gamma", {"linear": Gamma(GAMMA)}, "epsilon"),
            statistic, include=["weight_hh*"], matmul_dtype=None,
        )  # fmt: skip
        torch.testing.assert_close(relevance["weight_hh_l0"].double(), expected, rtol=1e-5, atol=1e-7)


def test_a_product_of_two_activations_has_no_terms() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, filters: Tensor) -> Tensor:
            return nn.functional.conv1d(x, filters)

    model, message = Model(), r"Gamma\(gamma=0.5, stabilizer=0.0\) is for a product with a weight.*conv1d in <model>"
    with (
        lrp_prune.register_rule(torch.conv1d, Gamma(0.5)),
        lrp_prune.attributing(model),
        pytest.raises(ValueError, match=message),
    ):
        model(torch.randn(1, 2, 5), torch.randn(3, 2, 3))


class _Contracted(nn.Module):
    def __init__(self, equation: str, matrices: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.equation = equation
        self.matrices = nn.ParameterList(nn.Parameter(torch.randn(4, 4)) for _ in range(matrices))
        self.head = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.einsum(self.equation, *self.matrices, x))


def test_contractions_of_more_or_fewer_tensors_than_two() -> None:
    """The order of one tensor needs no rule; what is multiplied by two weights at once has no terms."""
    composite, x = Composite("terms", {"linear": Gamma(GAMMA)}, base="epsilon"), torch.randn(3, 4)
    turned = lrp_prune.attribute(_Contracted("ij->ij", 0), [x], target=_first, composite=composite)
    assert list(turned) == ["head.weight"]
    with pytest.raises(ValueError, match="einsum in <model> contracts 3 tensors at once: write it as products of two"):
        lrp_prune.attribute(_Contracted("ij,jk,bi->bk", 2), [x], target=_first, composite=composite)
    lrp_prune.attribute(_Contracted("ij,jk,bi->bk", 2), [x], target=_first, composite="epsilon")


def _first(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)[:, 0].sum()


def test_a_function_that_is_registered_as_linear_has_its_bias() -> None:
    def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    visible = torch.overrides.wrap_torch_function(lambda x, weight, bias: (x, weight, bias))(product)

    class Own(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.weight, self.bias = layer.weight, layer.bias

        def forward(self, x: Tensor) -> Tensor:
            return visible(x, self.weight, self.bias)

    torch.manual_seed(0)
    layer, composite = nn.Linear(5, 3), Composite("terms", {"linear": Gamma(0.5)}, base="epsilon")
    x = torch.randn(4, 5)
    expected = lrp_prune.attribute(nn.Sequential(layer), [x], target=_first, composite=composite)["0.weight"]
    with lrp_prune.register_rule(visible, "linear"):
        found = lrp_prune.attribute(Own(layer), [x], target=_first, composite=composite)["weight"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rule", RULES)
def test_in_mixed_precision_terms_are_those_of_float32_up_to_its_rounding(rule: str) -> None:
    """Sums of squares of half-precision terms would overflow, and their differences vanish."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4))
    composite = Composite("declared", {"linear": RULES[rule][0]})
    batches = [{"input": 8 * torch.randn(6, 24)}]

    def found(**settings: Any) -> lrp_prune.Relevance:
        with torch.autocast("cpu", **settings):
            return lrp_prune.attribute(
                model, batches, target=lambda model, batch: model(batch["input"]).float().amax(-1).sum(),
                composite=composite, statistic="squared_token",
            )  # fmt: skip

    exact, rounded = found(enabled=False), found(dtype=torch.bfloat16)
    for name in exact:
        assert rounded[name].dtype == torch.float32
        assert float((rounded[name] - exact[name]).norm() / exact[name].norm()) < 0.1


@pytest.mark.parametrize("include", [None, ["1.down"]])
def test_a_block_beside_a_projection_is_found_by_any_rule(include: list[str] | None) -> None:
    """One layer beside several is the stream in another width, also where the layers have rules of terms."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.short = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(5, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.short(x) + self.down(self.up(x).relu())

    model, composite = nn.Sequential(nn.Linear(5, 5), Block(), nn.Linear(7, 2)), Composite("g", {"linear": Gamma(0.4)})
    found = lrp_prune.attribute(
        model, [torch.randn(4, 5)], lambda m, b: m(b).sum(), composite, granularity="block", include=include
    )
    assert list(found) == ["1.down"]
