"""Rules that are declared by terms, against their formulas written out one contribution at a time, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Composite
from lrp_prune.attribution import AlphaBeta, Gamma, Group, Term, Terms
from lrp_prune.relevance.statistics import OF_RELEVANCE, Statistic

GAMMA = 0.4
STATISTICS = [*(name for name in OF_RELEVANCE if name != "geometric"), Statistic("cubed_token", power=3)]


def gamma_shares(contributions: Tensor, bias: Tensor) -> Tensor:
    """What of each output's relevance goes to each contribution ``[..., outputs, inputs]``: those of its sign count more."""
    everything = torch.cat([contributions, bias[..., None]], -1)
    z = everything.sum(-1, keepdim=True)
    favoured = everything * (1 + GAMMA * (everything * z > 0))
    return (favoured / favoured.sum(-1, keepdim=True))[..., :-1]


def alpha_beta_shares(contributions: Tensor, bias: Tensor) -> Tensor:
    """Twice the share among positive contributions, minus that among negative ones; of a sign that there is none of, nothing."""
    everything = torch.cat([contributions, bias[..., None]], -1)
    positive, negative = everything * (everything > 0), everything * (everything < 0)
    shares = [part / part.sum(-1, keepdim=True) for part in (positive, negative)]
    return (2 * shares[0].nan_to_num(0) - shares[1].nan_to_num(0))[..., :-1]


RULES: dict[str, tuple[Terms, Callable[[Tensor, Tensor], Tensor]]] = {
    "gamma": (Gamma(GAMMA), gamma_shares),
    "alpha_beta": (AlphaBeta(2, 1), alpha_beta_shares),
}


class Case:
    """A layer, its input ``[samples, ...]``, and its contributions written out.

    Args:
        layer: without padding or stride.
        x: the input.
    """

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        torch.manual_seed(1)
        self.layer, self.x = layer.double(), x.double()
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        self.c = torch.randn(layer(self.x).shape, dtype=torch.float64)
        convolution = isinstance(layer, nn.Conv1d)
        self.places = self.x.unfold(2, layer.kernel_size[0], 1).movedim(1, 2).flatten(2) if convolution else self.x
        """``[samples, tokens, inputs]``."""
        self.weight = layer.weight.detach().flatten(1)
        self.contributions = self.places[:, :, None] * self.weight
        bias = torch.zeros(len(self.weight), dtype=torch.float64) if layer.bias is None else layer.bias.detach()
        self.bias = bias.expand(self.contributions.shape[:-1])
        z = layer(self.x).detach()
        self.relevance = (self.c * z).movedim(1, 2) if convolution else self.c * z
        """Of the outputs, ``[samples, tokens, outputs]``."""

    def target(self, model: nn.Module, batch: Any) -> Tensor:
        """The explained value, which gives each output ``c`` times its value."""
        return (model(batch) * self.c).sum()

    def messages(self, shares: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Relevance ``[samples, tokens, outputs, inputs]`` between each output and input."""
        return shares(self.contributions, self.bias) * self.relevance[..., None]

    def conserved(self, rule: str) -> Tensor:
        """Relevance of all outputs; where alpha and beta find contributions of one sign only, of their share."""
        positive, negative = (self.contributions > 0).any(-1), (self.contributions < 0).any(-1)
        assert (positive & negative).any()
        kept = 2 * positive.double() - negative.double()
        return self.relevance.sum() if rule == "gamma" else (self.relevance * kept).sum()

    def of_inputs(self, messages: Tensor) -> Tensor:
        """Relevance of the inputs, in their shape."""
        by_place = messages.sum(2)
        if not isinstance(self.layer, nn.Conv1d):
            return by_place
        found, width = torch.zeros_like(self.x), self.layer.kernel_size[0]
        for place in range(by_place.shape[1]):
            found[:, :, place : place + width] += by_place[:, place].view(len(self.x), -1, width)
        return found


def linear(bias: bool) -> Case:
    return Case(nn.Linear(5, 4, bias=bias), torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0)))


def convolution(bias: bool) -> Case:
    return Case(nn.Conv1d(2, 4, 3, bias=bias), torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(0)))


CASES = {
    "linear": lambda: linear(False),
    "linear with bias": lambda: linear(True),
    "convolution": lambda: convolution(False),
    "convolution with bias": lambda: convolution(True),
}


def composite(rule: str) -> Composite:
    return Composite(rule, {"linear": RULES[rule][0], "convolution": RULES[rule][0]})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", RULES)
def test_inputs_get_the_relevance_of_the_formula(rule: str, case: str) -> None:
    made = CASES[case]()
    with lrp_prune.attributing(made.layer, composite(rule)) as propagation:
        output = made.layer(made.x)
        found = propagation.relevance((output * made.c).sum())["input"]
    assert torch.equal(output, made.layer(made.x))
    expected = made.of_inputs(made.messages(RULES[rule][1]))
    torch.testing.assert_close(found, expected)
    if "bias" not in case:
        torch.testing.assert_close(found.sum(), made.conserved(rule))


@pytest.mark.parametrize("statistic", STATISTICS, ids=lambda statistic: getattr(statistic, "name", statistic))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rule", RULES)
def test_weights_get_the_relevance_of_the_formula_in_every_statistic(rule: str, case: str, statistic: Any) -> None:
    made = CASES[case]()
    relevance = lrp_prune.attribute(
        made.layer, [made.x], made.target, composite(rule), statistic, include=["weight"], matmul_dtype=None
    )
    messages, samples = made.messages(RULES[rule][1]), len(made.x)
    if statistic == "signed":
        expected = messages.sum((0, 1)) / samples
    elif statistic == "abs_sample" or (statistic == "pxp" and isinstance(made.layer, nn.Conv1d)):
        expected = messages.sum(1).abs().sum(0) / samples
    else:
        power = {"abs_token": 1, "pxp": 1, "squared_token": 2}.get(statistic, 3)
        expected = (messages.abs().pow(power).sum((0, 1)) / samples) ** (1 / power)
    torch.testing.assert_close(relevance["weight"].double(), expected.view_as(made.layer.weight), rtol=1e-5, atol=1e-6)
    if statistic == "signed" and "bias" not in case:
        total = relevance.sums["weight"].sum()
        torch.testing.assert_close(total, made.conserved(rule))


@pytest.mark.parametrize("case", ["linear", "convolution"])
def test_geometric_is_of_the_rules_relevance_and_of_contributions(case: str) -> None:
    made = CASES[case]()
    relevance = lrp_prune.attribute(
        made.layer, [made.x], made.target, composite("gamma"), "geometric", include=["weight"], matmul_dtype=None
    )
    samples = len(made.x)
    energy = made.messages(gamma_shares).square().sum((0, 1)) / samples
    contributed = made.weight.abs() * (made.places.square().sum((0, 1)) / samples).sqrt()
    expected = energy ** (1 / 3) * (contributed / contributed.mean()) ** (1 / 3)
    torch.testing.assert_close(relevance["weight"].double(), expected.view_as(made.layer.weight), rtol=1e-5, atol=1e-6)


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


def test_gamma_zero_is_the_plain_gradient_and_a_large_one_leaves_out_what_counters() -> None:
    made = linear(True)
    found = {}
    for name, rule in (("plain", "gradient"), ("none", Gamma(0.0)), ("large", Gamma(1e9))):
        with lrp_prune.attributing(made.layer, Composite("mine", {"linear": rule})) as propagation:
            found[name] = propagation.relevance((made.layer(made.x) * made.c).sum())["input"]
    torch.testing.assert_close(found["none"], found["plain"])
    everything = torch.cat([made.contributions, made.bias[..., None]], -1)
    kept = everything * (everything * everything.sum(-1, keepdim=True) > 0)
    shares = (kept / kept.sum(-1, keepdim=True))[..., :-1]
    torch.testing.assert_close(found["large"], (shares * made.relevance[..., None]).sum(2), rtol=1e-6, atol=1e-6)


def test_a_weight_that_is_scaled_masked_or_transposed_is_scored_as_it_is_used() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.kernel = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
            self.register_buffer("mask", (torch.rand(5, 4) > 0.3).double())

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(torch.zeros(4, dtype=torch.float64), x, -2 * self.kernel * self.mask)

    model, x = Layer(), torch.randn(3, 5, dtype=torch.float64)
    used, z = (-2 * model.kernel * model.mask).detach().T, model(x).detach()
    messages = gamma_shares(x[:, None] * used, torch.zeros(3, 4).double()) * z[..., None]
    relevance = lrp_prune.attribute(
        model, [x], lambda m, b: m(b).sum(), composite("gamma"), "abs_token", include=["kernel"], matmul_dtype=None
    )
    torch.testing.assert_close(relevance["kernel"].double(), messages.abs().mean(0).T, rtol=1e-5, atol=1e-7)


def test_tokens_that_do_not_count_enter_no_statistic() -> None:
    """Padding is propagated through as any token, but is none of the sums."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, bias=False).double()

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(inputs_embeds)

    x, mask = torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor([[1, 1, 1], [1, 0, 0]])
    z = layer(x).detach()
    messages = gamma_shares(x[:, :, None] * layer.weight.detach(), torch.zeros(2, 3, 4).double()) * z[..., None]
    expected = (messages * mask[..., None, None]).sum(1).abs().mean(0)
    relevance = lrp_prune.attribute(
        Masked(), [{"inputs_embeds": x, "attention_mask": mask}], lambda m, b: m(**b).sum(), composite("gamma"),
        "abs_sample", include=["layer.weight"], matmul_dtype=None,
    )  # fmt: skip
    torch.testing.assert_close(relevance["layer.weight"].double(), expected, rtol=1e-5, atol=1e-7)


def test_an_activation_that_is_added_to_a_product_keeps_what_it_adds() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))

        def forward(self, added: Tensor, x: Tensor) -> Tensor:
            return torch.addmm(added, x, self.weight)

    model, added, x = Layer(), torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    with lrp_prune.attributing(model, composite("gamma")) as propagation:
        output = model(added, x)
        relevance = propagation.relevance(output.sum())
    assert torch.equal(output, model(added, x))
    product = (x @ model.weight).detach()
    messages = gamma_shares(x[:, None] * model.weight.detach().T, torch.zeros(3, 4).double()) * product[..., None]
    torch.testing.assert_close(relevance["added"], added)
    torch.testing.assert_close(relevance["x"], messages.sum(1))


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


def test_a_rule_of_ones_own_is_its_terms() -> None:
    class Doubled(Terms):
        """All contributions of positive inputs, twice."""

        @property
        def groups(self) -> tuple[Group, ...]:
            return (Group((Term("positive", "whole", 3.0),), share=2.0),)

    made = linear(False)
    relevance = lrp_prune.attribute(
        made.layer, [made.x], made.target, Composite("mine", {"linear": Doubled()}), "signed",
        include=["weight"], matmul_dtype=None,
    )  # fmt: skip
    kept = made.contributions * (made.places > 0)[:, :, None]
    expected = 2 * kept / kept.sum(-1, keepdim=True) * made.relevance[..., None]
    torch.testing.assert_close(relevance["weight"].double(), expected.sum((0, 1)) / 3, rtol=1e-5, atol=1e-6)


def test_rules_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gamma must be a number in \[0, inf\), got -1"):
        Gamma(-1)
    with pytest.raises(ValueError, match=r"alpha - beta must be 1 and beta at least 0, got 2 and 2"):
        AlphaBeta(2, 2)
    with pytest.raises(
        ValueError,
        match=r"composite 'mine': Gamma\(gamma=0.5, stabilizer=0.0\) is a rule for \(.*\), not for 'activation'",
    ):
        Composite("mine", {"activation": Gamma(0.5)})


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
