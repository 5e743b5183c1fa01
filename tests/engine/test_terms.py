"""Rules that are declared by terms, against their formulas written out one contribution at a time, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Composite
from lrp_prune.attribution import AlphaBeta, Gamma, Group, Term, Terms
from lrp_prune.relevance.statistics import OF_RELEVANCE, Statistic
from tests.support.written_shares import RULES, composite, gamma_shares

STATISTICS = [*(name for name in OF_RELEVANCE if name != "geometric"), Statistic("cubed_token", power=3)]


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
