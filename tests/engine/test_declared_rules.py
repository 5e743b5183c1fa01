"""Each declared rule, in layers of every dimension, against its formula written out one contribution at a time, in float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lrp_prune
from lrp_prune import Composite
from lrp_prune.attribution import AlphaBeta, Epsilon, Flat, Gamma, Group, Term, Terms, WSquare, ZBox, ZPlus
from tests.support.written_rules import CONSERVING, LAYERS, RULES, Case, declared

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rule", RULES)
def test_inputs_get_the_relevance_of_the_formula(rule: str, layer: str) -> None:
    case = Case(layer, RULES[rule][1])
    with lrp_prune.attributing(case.layer, declared(RULES[rule][0])) as propagation:
        output = case.layer(case.x)
        (found,) = propagation.relevance((output * case.c).sum()).values()
    assert torch.equal(output, case.layer(case.x))
    torch.testing.assert_close(found, case.of_inputs, **EXACT)


@pytest.mark.parametrize("statistic", ["signed", "abs_sample", "abs_token", "squared_token"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rule", RULES)
def test_weights_get_the_relevance_of_the_formula(rule: str, layer: str, statistic: str) -> None:
    case = Case(layer, RULES[rule][1])
    expected = {
        "signed": lambda: case.of_weights(case.messages).sum(0),
        "abs_sample": lambda: case.of_weights(case.messages).abs().sum(0),
        "abs_token": lambda: case.of_weights(case.messages.abs()).sum(0),
        "squared_token": lambda: case.of_weights(case.messages.square()).sum(0),
    }[statistic]()
    torch.testing.assert_close(case.found(RULES[rule][0], statistic), expected, **EXACT)


@pytest.mark.parametrize("layer", ["linear with bias", "conv2d, grouped and padded"])
@pytest.mark.parametrize("rule", RULES)
def test_of_inputs_without_negative_entries_the_half_that_is_computed_is_all(rule: str, layer: str) -> None:
    """As they are after a ReLU."""
    case = Case(layer, RULES[rule][1], positive=True)
    with lrp_prune.attributing(case.layer, declared(RULES[rule][0])) as propagation:
        (found,) = propagation.relevance(case.target(case.layer, case.x)).values()
    torch.testing.assert_close(found, case.of_inputs, **EXACT)
    expected = case.of_weights(case.messages.abs()).sum(0)
    torch.testing.assert_close(case.found(RULES[rule][0], "abs_token"), expected, **EXACT)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rule", CONSERVING)
def test_a_layer_conserves_relevance_where_its_rule_does(rule: str, layer: str) -> None:
    """Of inputs, zeros among them, and of weights: also with a bias, where the rule gives it nothing."""
    case = Case(layer, RULES[rule][1])
    with lrp_prune.attributing(case.layer, declared(RULES[rule][0])) as propagation:
        (found,) = propagation.relevance(case.target(case.layer, case.x)).values()
    if rule == "gamma" and case.layer.bias is not None:
        assert abs(float(found.sum() - case.relevance.sum())) > 1e-3  # what the bias keeps
        return
    torch.testing.assert_close(found.sum(), case.relevance[:, case.has_input].sum(), **EXACT)
    torch.testing.assert_close(case.found(RULES[rule][0], "signed").sum(), found.sum(), **EXACT)


def test_a_weight_of_zero_has_its_share_where_the_rule_does_not_ask_how_large_it_is() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False).double()
    with torch.no_grad():
        layer.weight[1, 2] = 0.0
    x = torch.randn(2, 4, dtype=torch.float64)
    z = layer(x).detach()
    for statistic, expected in (
        ("signed", z.sum(0) / 4),
        ("abs_token", z.abs().sum(0) / 4),
        ("squared_token", (z / 4).square().sum(0)),
    ):
        found = lrp_prune.attribute(layer, [x], lambda m, b: m(b).sum(), declared(Flat()), statistic)
        torch.testing.assert_close(found.sums["weight"], expected[:, None].expand(3, 4), **EXACT)


def test_geometric_is_of_the_rules_relevance_where_the_weight_is_no_factor_of_it() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3, bias=False).double(), torch.randn(5, 4, dtype=torch.float64)
    z = layer(x).detach()
    found = lrp_prune.attribute(layer, [x], lambda m, b: m(b).sum(), declared(Flat()), "geometric")["weight"]
    energy = (z / 4).square().sum(0)[:, None] / 5
    contributed = layer.weight.detach().abs() * (x.square().sum(0) / 5).sqrt()
    expected = energy ** (1 / 3) * (contributed / contributed.mean()) ** (1 / 3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


class _Moved(nn.Module):
    """A layer whose input is data in another order, with something around it, or has been computed."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.layer = way, nn.Linear(8, 3, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "moved":
            x = nn.functional.pad(x.transpose(1, 2).flatten(1), (1, 1))
        else:
            x = nn.functional.pad(x.flatten(1).relu(), (1, 1))
        return self.layer(x)


@pytest.mark.parametrize("rule", [Flat(), WSquare(), ZBox(-3, 3)], ids=str)
def test_zeros_in_data_have_their_relevance_however_they_are_moved(rule: Terms) -> None:
    x = torch.randn(2, 2, 3, dtype=torch.float64)
    x[0, 1, 2] = x[1, 0, 0] = 0.0
    model = _Moved("moved")
    with lrp_prune.attributing(model, declared(rule)) as propagation:
        zeros = propagation.relevance(model(x).sum())["x"]
    nearly = torch.where(x == 0, 1e-13, x)
    with lrp_prune.attributing(model, declared(rule)) as propagation:
        expected = propagation.relevance(model(nearly).sum())["x"]
    assert (zeros[x == 0].abs() > 1e-3).all()
    torch.testing.assert_close(zeros, expected, rtol=1e-9, atol=1e-9)


class _Parallel(nn.Module):
    """Two layers that read the same data."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.one, self.two = nn.Linear(4, 3, bias=False).double(), nn.Linear(4, 2, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._both, x, use_reentrant=False) if self.checkpointed else self._both(x)

    def _both(self, x: Tensor) -> Tensor:
        return self.one(x).sum(1) + self.two(x).sum(1)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_zeros_in_data_have_what_each_layer_gives_them_in_each_pass(checkpointed: bool) -> None:
    """And so have entries so small that relevance over them is infinite."""
    model, x = _Parallel(checkpointed), torch.randn(2, 4, dtype=torch.float64)
    x[0, 1], x[1, 2] = 0.0, 5e-324
    expected = model(x).detach()[:, None].expand(2, 4) / 4
    with lrp_prune.attributing(model, declared(Flat())) as propagation:
        for _ in range(2):
            torch.testing.assert_close(propagation.relevance(model(x).sum())["x"], expected, **EXACT)


def test_inside_a_model_what_goes_to_zeros_ends_there() -> None:
    model, x = _Moved("computed"), torch.randn(2, 2, 3, dtype=torch.float64)
    composite = Composite("declared", {"layer": Flat()}, base="epsilon")
    with lrp_prune.attributing(model, composite) as propagation:
        value = model(x)
        found = propagation.relevance(value.sum())["x"]
    expected = (value.detach().sum(1) / 8)[:, None, None] * (x > 0)
    torch.testing.assert_close(found, expected, **EXACT)


def test_tokens_that_do_not_count_have_no_part_of_a_constant() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(5, 4, bias=False).double()

        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(inputs_embeds)

    model, x = Masked(), torch.randn(2, 3, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    z = model.layer(x).detach() * mask[..., None]
    for statistic, expected in (("abs_token", z.abs().sum((0, 1))), ("abs_sample", z.sum(1).abs().sum(0))):
        relevance = lrp_prune.attribute(
            model, [{"inputs_embeds": x, "attention_mask": mask}], lambda m, b: m(**b).sum(), declared(Flat()),
            statistic, include=["layer.weight"], matmul_dtype=None,
        )  # fmt: skip
        torch.testing.assert_close(relevance.sums["layer.weight"], (expected / 5)[:, None].expand(4, 5), **EXACT)


IN_STEPS = ["epsilon", "gamma", "alpha_beta", "z_plus, stabilised", "flat", "w_square", "z_box"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("rule", IN_STEPS)
def test_in_recurrent_layers_weights_and_inputs_have_the_same_relevance(rule: str, kind: Any, bias: bool) -> None:
    """Of all steps, the first one from a state of zeros among them; without biases it is all there is, of rules that conserve."""
    torch.manual_seed(0)
    layer = kind(3, 5, bias=bias, batch_first=True).double()
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    x[0, 2, 1] = 0.0
    composite = Composite("declared", {"linear": RULES[rule][0]}, base="attnlrp")
    with lrp_prune.attributing(layer, composite) as propagation:
        value = layer(x)[0][:, -1].sum()
        found = propagation.relevance(value)["input"].sum()
    assert torch.equal(value, layer(x)[0][:, -1].sum())
    of_weights = lrp_prune.attribute(
        layer, [x], lambda m, b: m(b)[0][:, -1].sum(), composite, "signed", matmul_dtype=None
    )
    torch.testing.assert_close(of_weights.sums["weight_ih_l0"].sum(), found, **EXACT)
    assert of_weights.sums["weight_hh_l0"].abs().sum() > 1e-3
    if rule in CONSERVING and not bias:
        torch.testing.assert_close(found, value.detach(), **EXACT)


@pytest.mark.parametrize("rule", [Epsilon(0.3), Flat(), WSquare(), ZBox(-3, 3)], ids=str)
def test_experts_that_are_multiplied_at_once_have_what_each_by_itself_has(rule: Terms) -> None:
    """All of them in one function of stacked weights, which looks at how its operands lie in memory."""

    class Experts(nn.Module):
        def __init__(self, at_once: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.at_once, self.weights = at_once, nn.Parameter(torch.randn(3, 8, 16))

        def forward(self, x: Tensor) -> Tensor:
            if self.at_once:
                return torch._grouped_mm(x, self.weights, offs=torch.tensor([2, 2, 7], dtype=torch.int32))
            return torch.cat([x[:2] @ self.weights[0], x[2:] @ self.weights[2]])

    x, found = torch.randn(7, 8), []
    for at_once in (True, False):
        model = Experts(at_once)
        with lrp_prune.attributing(model, declared(rule)) as propagation:
            of_inputs = propagation.relevance(model(x).sum())["x"]
        of_weights = lrp_prune.attribute(
            model, [x], lambda m, b: m(b).sum(), declared(rule), "abs_token", matmul_dtype=None
        )
        found.append((of_inputs, of_weights.sums["weights"]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_used_under_rules_of_both_kinds_is_not_scored() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.two.weight, self.head = self.one.weight, nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.two(self.one(x)))

    composite = Composite("both", {lrp_prune.attribution.Where("linear", name="one"): Flat()}, base="epsilon")
    found = lrp_prune.attribute(Twice(), [torch.randn(3, 4)], lambda m, b: m(b).sum(), composite)
    assert list(found) == ["head.weight"]
    assert any("leaves out of account" in reason for reason in found.unscored.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Epsilon(-1), r"epsilon must be a number in \[0, inf\), got -1"),
        *[
            (partial(rule, stabilizer=stabilizer), rf"stabilizer must be a number in \[0, inf\), got {stabilizer}")
            for rule in (Gamma, AlphaBeta, ZPlus, Flat, WSquare, partial(ZBox, -1, 1))
            for stabilizer in (-0.5, float("inf"), None)
        ],
        (lambda: AlphaBeta(float("nan"), 1), r"alpha must be a number in \(-inf, inf\), got nan"),
        (lambda: AlphaBeta(float("inf"), float("inf")), r"alpha must be a number in \(-inf, inf\), got inf"),
        (lambda: ZBox(1, 2), "low must be at most 0 and high at least 0, both finite, got 1.0 and 2.0"),
        (lambda: ZBox(-1, float("inf")), "both finite, got -1.0 and inf"),
        (lambda: ZBox(0, 0), "low and high must leave room"),
        (lambda: ZBox((-1, -1), (1, -1)), "low must be at most 0"),
    ],
)
def test_rules_that_make_no_sense_are_refused(make: Callable[[], Terms], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Term("postive"), r"input must be one of \('positive', 'negative', 'whole'\), got 'postive'"),
        (lambda: Term((0.0, float("nan"))), r"input must be a number in \(-inf, inf\), got nan"),
        (lambda: Term(weight="all"), r"weight must be one of \(.*\), got 'all'"),
        (lambda: Term(factor=None), r"factor must be a number in \(-inf, inf\), got None"),
        (lambda: Term(power=0.5), "power must be an integer of at least 0, got 0.5"),
        (lambda: Group(()), r"terms must be one Term or several, in a tuple, got \(\)"),
        (lambda: Group(("whole",)), "terms must be one Term or several"),
        (lambda: Group((Term(),), outputs="plus"), r"outputs must be one of \(.*\), got 'plus'"),
        (lambda: Group((Term(),), share="half"), r"share must be a number in \(-inf, inf\), got 'half'"),
        (lambda: Group((Term(),), stabilizer=-1), r"stabilizer must be a number in \[0, inf\), got -1"),
    ],
)
def test_parts_that_there_are_not_are_refused_where_they_are_written(make: Any, message: str) -> None:
    """What is neither of two signs would be read as the second of them."""
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rule_without_groups_is_refused_in_the_forward() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    message = "declares no group of terms, so that no relevance would go on"
    with lrp_prune.attributing(layer, declared(_Own())), pytest.raises(ValueError, match=message):
        layer(x)
    with pytest.raises(ValueError, match=message):
        lrp_prune.attribute(layer, [x], lambda m, b: m(b).sum(), declared(_Own()))


def test_bounds_of_other_channels_than_the_input_has_are_refused() -> None:
    layer = nn.Conv2d(3, 2, 2)
    with lrp_prune.attributing(layer, declared(ZBox((-1, -1), 1))) as propagation:
        value = layer(torch.randn(1, 3, 4, 4)).sum()
        with pytest.raises(ValueError, match="a constant for each of 2 channels, and the input has 3"):
            propagation.relevance(value)


@dataclass(frozen=True)
class _Own(Terms):
    given: tuple[Group, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.given


def test_terms_that_make_no_product_of_input_weight_and_output_are_refused() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    for groups, message in (
        ((Group((Term(), Term(power=2))),), "several powers of the same weights"),
        ((Group((Term(),)), Group((Term(1.0),))), "in a group of their own"),
    ):
        with lrp_prune.attributing(layer, declared(replace(_Own(), given=groups))) as propagation:
            value = layer(x).sum()
            with pytest.raises(ValueError, match=message):
                propagation.relevance(value)
