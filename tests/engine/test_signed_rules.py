"""Rules that look at the sign of contributions: as few products as there can be, and the formula wherever they do not do."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import lrp_prune
from lrp_prune.attribution import AlphaBeta, Epsilon, Flat, Gamma, Group, Term, Terms, WSquare, ZPlus
from lrp_prune.engine.rules.layers import Layer
from tests.support.written_rules import declared

EXACT = {"rtol": 1e-10, "atol": 1e-10}
_POSITIVE = (Term("positive", "positive"), Term("negative", "negative"))
_NEGATIVE = (Term("positive", "negative"), Term("negative", "positive"))


def by_sign(positive: float, negative: float, **settings: object) -> Group:
    """A group that multiplies positive and negative contributions by its own numbers."""
    parts = ((_POSITIVE, positive), (_NEGATIVE, negative))
    terms = tuple(Term(term.input, term.weight, factor) for part, factor in parts for term in part if factor)
    return Group(terms, **settings)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Declared(Terms):
    """A rule of given groups."""

    parts: tuple[Group, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.parts


FACTORS: dict[str, list[tuple[float, float, dict[str, object]]]] = {
    "one sign of outputs": [(2.0, 1.0, {"outputs": "positive"})],
    "against the sign": [(-1.0, 3.0, {})],
    "what is negative": [(0.0, 2.0, {"share": 0.5})],
    "unlike for both signs": [(3.0, 1.0, {"outputs": "positive"}), (1.0, 4.0, {"outputs": "negative", "share": 2.0})],
    "without the bias": [(1.0, 0.0, {"bias": False}), (0.0, 1.0, {"share": -0.5, "bias": False})],
    "gamma without the bias": [(1.5, 1.0, {"outputs": s, "bias": False}) for s in ("positive", "negative")],
    "favoured without the bias": [
        (1.5, 1.0, {"outputs": "positive", "bias": False}),
        (1.0, 1.5, {"outputs": "negative", "bias": False}),
    ],
    "favoured, and damped for one sign": [
        (1.5, 1.0, {"outputs": "positive", "stabilizer": 0.3}),
        (1.0, 1.5, {"outputs": "negative"}),
    ],
    "damped": [(2.0, 1.0, {"stabilizer": 0.3}), (1.0, 2.0, {"stabilizer": 0.1, "outputs": "negative"})],
}


def written(layer: nn.Linear, x: Tensor, relevance: Tensor, factors: Sequence[tuple[float, float, dict]]) -> Tensor:
    """Relevance ``[samples, outputs, inputs]`` by the formula."""
    c, bias = x[:, None] * layer.weight.detach(), layer.bias.detach().expand(relevance.shape)
    z, found = c.sum(-1) + bias, torch.zeros_like(c)
    for positive, negative, settings in factors:
        n, of_bias = (positive * part.clamp(min=0) + negative * part.clamp(max=0) for part in (c, bias))
        total = n.sum(-1) + of_bias * settings.get("bias", True)
        total = total + torch.where(total < 0, -1.0, 1.0).double() * settings.get("stabilizer", 0.0)
        chosen = {"positive": z > 0, "negative": z < 0}.get(settings.get("outputs", "whole"), torch.ones_like(z))
        found += settings.get("share", 1.0) * (n / total[..., None]) * (relevance * chosen)[..., None]
    return found


@pytest.mark.parametrize("reached", ["every output", "positive outputs", "negative outputs", "none"])
@pytest.mark.parametrize("positive", [False, True], ids=["either sign", "no negative"])
@pytest.mark.parametrize("name", FACTORS)
def test_inputs_and_weights_have_the_relevance_of_the_formula(name: str, positive: bool, reached: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5).double(), torch.randn(4, 6, dtype=torch.float64)
    x = x.abs() if positive else x
    z = layer(x).detach()
    c = torch.randn_like(z)
    if reached != "every output":
        c *= {"positive outputs": z > 0, "negative outputs": z < 0, "none": torch.zeros_like(z)}[reached]
    expected = written(layer, x, c * z, FACTORS[name])
    rule = declared(Declared(tuple(by_sign(*entry[:2], **entry[2]) for entry in FACTORS[name])))
    with lrp_prune.attributing(layer, rule) as propagation:
        (found,) = propagation.relevance((layer(x) * c).sum()).values()
    torch.testing.assert_close(found, expected.sum(1), **EXACT)
    of_weights = lrp_prune.attribute(
        layer, [x], lambda m, b: (m(b) * c).sum(), rule, "abs_token", include=["weight"], matmul_dtype=None
    )
    if reached != "none":
        torch.testing.assert_close(of_weights.sums["weight"], expected.abs().sum(0), **EXACT)


class Followed(nn.Module):
    """A layer before something."""

    def __init__(self, then: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.then = nn.Linear(40, 30).double(), then
        self.norm = nn.BatchNorm1d(30).double().eval()
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.then == "somebody who keeps what is saved":
            with saved_tensors_hooks(lambda saved: saved, lambda kept: kept):
                return self.layer(x)
        y = self.layer(x)
        if self.then == "relu":
            return y.relu()
        if self.then == "relu_":
            return y.relu_()
        return {"nothing": y, "norm": self.norm(y)}[self.then]


@pytest.mark.parametrize(
    ("rule", "positive", "then", "products", "gradients"),
    [
        (Epsilon(0.0), False, "relu", 0, 1),
        (Gamma(), False, "nothing", 1, 2),
        (Gamma(), False, "relu", 1, 2),
        (Gamma(), False, "somebody who keeps what is saved", 2, 2),  # and would save the memory of the output
        (Gamma(), True, "nothing", 1, 2),
        (Gamma(), True, "relu", 1, 1),
        (Gamma(), True, "relu_", 2, 1),  # what it was given is gone
        (Gamma(), True, "norm", 1, 2),
        (AlphaBeta(), True, "norm", 1, 2),
        (AlphaBeta(), False, "relu", 1, 2),
        (ZPlus(), True, "relu", 1, 1),
        (ZPlus(), False, "relu", 2, 2),  # parts of the input
    ],
    ids=str,
)
def test_no_more_is_multiplied_than_signs_and_neighbours_ask_for(
    rule: Terms, positive: bool, then: str, products: int, gradients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, made = Followed(then), torch.randn(3, 40, dtype=torch.float64), []
    x = x.abs() if positive else x
    for name in ("product", "input_gradient"):
        method = getattr(Layer, name)

        def counted(self: Layer, *args: object, name: str = name, method: object = method) -> Tensor:
            made.append(name)
            return method(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(Layer, name, counted)
    with lrp_prune.attributing(model, declared(rule)) as propagation:
        propagation.relevance(model(x).sum())
    assert (made.count("product"), made.count("input_gradient")) == (products, gradients)


COUNTERED = Declared((by_sign(0.0, 1.0, outputs="positive"), by_sign(1.0, 0.0, outputs="negative")))
"""Shares by what counters an output."""


@pytest.mark.parametrize("positive", [False, True], ids=["either sign", "no negative"])
@pytest.mark.parametrize("rule", [AlphaBeta(), ZPlus(), Gamma(), COUNTERED], ids=str)
def test_what_hardly_counters_an_output_loses_no_digits(rule: Terms, positive: bool) -> None:
    """A ten-millionth of a sum in float32 is all rounding, if it is what is left of a difference."""
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 6, bias=False), torch.randn(5, 8)
    x = x.abs() if positive else x
    with torch.no_grad():
        layer.weight.copy_(layer.weight.abs() * x[0].sign())  # of the first sample all contributions are positive,
        layer.weight[:, 1] *= -1e-7  # but for this one
        layer.weight[3, 1] = 0.0
    found = []
    for dtype in (torch.float32, torch.float64):
        model = nn.Linear(8, 6, bias=False).to(dtype)
        model.load_state_dict(layer.state_dict())
        with lrp_prune.attributing(model, declared(rule)) as propagation:
            (relevance,) = propagation.relevance(model(x[:1].to(dtype)).sum()).values()
        found.append(relevance.double())
    contributions = (x[:1, None] * layer.weight).double().detach()
    z = contributions.sum(-1, keepdim=True)
    if isinstance(rule, AlphaBeta):
        negative = contributions.clamp(max=0)
        shares = 2 * contributions.clamp(min=0) / contributions.clamp(min=0).sum(-1, keepdim=True)
        shares = shares - (negative / negative.sum(-1, keepdim=True)).nan_to_num(0.0)
        torch.testing.assert_close(found[1], (shares * z).sum(1))
        assert found[1][0, 1] < 0  # minus beta of five outputs
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("rule", [Gamma(), AlphaBeta(), ZPlus()], ids=str)
def test_a_contraction_that_adds_inputs_up_by_themselves_is_a_layer_with_the_same_weight_for_each(rule: Terms) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.5, -2.0, 0.5], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,o->bo", x, self.weight)

    torch.manual_seed(0)
    model, x, found = Model(), torch.randn(2, 4, dtype=torch.float64), []
    layer = nn.Linear(4, 3, bias=False).double()
    layer.weight.data.copy_(model.weight.detach()[:, None])
    for entry in (model, layer):
        with lrp_prune.attributing(entry, declared(rule)) as propagation:
            found += propagation.relevance(entry(x).sum()).values()
    torch.testing.assert_close(found[0], found[1], **EXACT)


def test_an_output_in_less_precision_than_the_rule_s_is_computed_again() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5).bfloat16(), torch.randn(4, 6, dtype=torch.bfloat16)
    found = lrp_prune.attribute(
        layer, [x], lambda m, b: m(b).sum(), declared(Gamma(1.0)), "abs_token", include=["weight"], matmul_dtype=None
    )
    wide = nn.Linear(6, 5).double()
    wide.load_state_dict(layer.state_dict())
    factors = [(2.0, 1.0, {"outputs": "positive"}), (1.0, 2.0, {"outputs": "negative"})]
    expected = written(wide, x.double(), wide(x.double()).detach(), factors)
    torch.testing.assert_close(found.sums["weight"].double(), expected.abs().sum(0), rtol=1e-5, atol=0.0)


def test_an_output_that_the_model_changes_in_place_is_computed_again() -> None:
    class Model(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.in_place = nn.Linear(6, 5).double(), in_place

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.layer(x)
            changed = y.add_(x[:, :5]) if self.in_place else y + x[:, :5]
            return changed, y  # so that it is still there

    x = torch.randn(3, 6, dtype=torch.float64)
    found = []
    for in_place in (False, True):
        model = Model(in_place)
        with lrp_prune.attributing(model, declared(Gamma())) as propagation:
            outputs = model(x)
            found += propagation.relevance(outputs[0].sum()).values()
    torch.testing.assert_close(found[1], found[0], **EXACT)


@pytest.mark.parametrize("scales", ["above zero", "of either sign"])
@pytest.mark.parametrize("rule", [Gamma(), AlphaBeta(), ZPlus(), Flat(), WSquare()], ids=str)
def test_a_normalisation_is_part_of_the_layer_whether_its_scale_is_multiplied_into_the_weight_or_not(
    rule: Terms, scales: str
) -> None:
    model, x = Followed("norm"), torch.randn(3, 40, dtype=torch.float64)
    if scales == "of either sign":
        with torch.no_grad():
            model.norm.weight[::2] *= -1
    merged = nn.Linear(40, 30).double()
    scale = (model.norm.weight / (1 + model.norm.eps) ** 0.5).detach()
    merged.weight.data, merged.bias.data = model.layer.weight.detach() * scale[:, None], model.layer.bias * scale
    found = []
    for entry, name in ((model, "layer.weight"), (merged, "weight")):
        with lrp_prune.attributing(entry, declared(rule)) as propagation:
            found.append(propagation.relevance(entry(x).sum())["x" if entry is model else "input"])
        weights = lrp_prune.attribute(
            entry, [x], lambda m, b: m(b).sum(), declared(rule), "signed", include=[name], matmul_dtype=None
        )
        found.append(weights.sums[name])
    torch.testing.assert_close(found[0], found[2], **EXACT)
    torch.testing.assert_close(found[1], found[3], **EXACT)
