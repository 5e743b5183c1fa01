"""Composites: a rule is what it is, however it is given; each kind that takes one asks for it; the others are refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Composite
from lrp_prune.attribution import COMPOSITES, RULES
from lrp_prune.engine import rules
from lrp_prune.engine.operations import KINDS
from lrp_prune.engine.rules import Call
from tests.support.small_models import batch_for, build, forward


class Everything(nn.Module):
    """One operation of each kind that a composite has rules for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm, self.drop = nn.Linear(4, 4, bias=False), nn.LayerNorm(4), nn.Dropout(0.5)
        self.filters = nn.Conv1d(3, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.filters(self.layer(x)))
        x = self.drop(torch.sigmoid(x)) * x
        x = F.max_pool1d(F.avg_pool1d(x, 3, 1, 1), 3, 1, 1) + x
        x = torch.softmax(x @ x.transpose(-1, -2), -1) @ x
        x = F.scaled_dot_product_attention(x, x, x)
        return x / (x.square().sum(-1, keepdim=True).sqrt() + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_asks_its_rule(kind: str) -> None:
    asked: list[Call] = []

    def rule(call: Call) -> Any:
        asked.append(call)
        return call.operand(0) if kind == "dropout" else call.run()

    model = Everything().train()
    with lrp_prune.attributing(model, Composite("mine", {kind: rule})) as propagation:
        propagation.relevance(model(torch.randn(2, 3, 4)).sum())
    assert asked
    expected = {"linear": {"layer"}, "convolution": {"filters"}, "normalization": {"norm"}, "dropout": {"drop"}}.get(
        kind, {""}
    )
    assert {call.name for call in asked} == expected


def test_a_rule_for_products_of_matrices_is_asked_for_two_activations_only_and_the_same_by_both() -> None:
    """``attribute`` observes weights, and must not bypass or add anything."""
    model, batch, asked = build("llama", "eager"), batch_for("llama"), []

    def rule(call: Call) -> Any:
        asked.append(tuple(map(rules.is_activation, call.operands())))
        return rules.uniform(call)

    composite = Composite("mine", {**COMPOSITES["attnlrp"].rules, "matmul": rule})
    with lrp_prune.attributing(model, composite) as propagation:
        one = propagation.relevance(forward(model, batch).sum())["model.embed_tokens"]
    assert asked == [(True, True)] * 4
    with lrp_prune.attributing(model, "attnlrp") as propagation:
        torch.testing.assert_close(one, propagation.relevance(forward(model, batch).sum())["model.embed_tokens"])
    scores = [
        lrp_prune.attribute(model, [batch], lambda m, b: forward(m, b).sum(), name, statistic="signed")
        for name in (composite, "attnlrp")
    ]
    assert asked == [(True, True)] * 8
    for name, values in scores[0].items():
        torch.testing.assert_close(values, scores[1][name])


def test_a_rule_for_linear_layers_is_honoured_where_it_can_be_and_refused_where_not() -> None:
    def halved(call: Call) -> Any:
        return 0.5 * call.run() + 0.5 * call.run().detach()

    model, x = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Conv1d(2, 2, 1, bias=False)), torch.randn(1, 2, 4)
    with lrp_prune.attributing(model, Composite("halved", {"linear": halved, "convolution": halved})) as propagation:
        value = model(x).sum()
        torch.testing.assert_close(propagation.relevance(value)["input"].sum(), value / 4)
    for refused in (halved, "stop"):
        with pytest.raises(
            ValueError, match=r"composite 'halved' has a rule of its own for 'linear' \((halved|stop)\)"
        ):
            lrp_prune.attribute(model, [x], lambda m, b: m(b).sum(), Composite("halved", {"linear": refused}))
    for plain in ("gradient", "uniform", rules.gradient):
        found = lrp_prune.attribute(model, [x], lambda m, b: m(b).sum(), Composite("plain", {"linear": plain}))
        assert list(found) == ["0.weight", "1.weight"]


class Gate(nn.Module):
    def forward(self, gate: Tensor, value: Tensor) -> Tensor:
        return torch.sigmoid(gate) * value


@pytest.mark.parametrize("rule", ["stop_gate", rules.stop_gate, lambda call: rules.stop_gate(call)])
def test_a_rule_that_asks_for_gates_is_told_however_it_is_given(rule: Any) -> None:
    gate, value = torch.randn(3, 4), torch.randn(3, 4)
    with lrp_prune.attributing(model := Gate(), Composite("mine", {"product": rule})) as propagation:
        relevance = propagation.relevance(model(gate, value).sum())
    assert not relevance["gate"].any()
    torch.testing.assert_close(relevance["value"], gate.sigmoid() * value)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_by_name_is_the_rule_itself(name: str) -> None:
    kinds = {
        "skip": "dropout",
        "stop": "softmax",
        "stop_denominator": "division",
        "scale": "statistic",
        "identity": "activation",
        "constant_statistic": "normalization",
        "attention_uniform": "attention",
        "attention_to_values": "attention",
        "attention_gradient": "attention",
        "winner": "max_pooling",
        "softmax_z_plus": "softmax",
        "attention_z_plus": "attention",
        "proportional": "average_pooling",
        **dict.fromkeys(("epsilon_sum", "equal_shares", "size_shares"), "sum"),
        **dict.fromkeys(("epsilon", "z_plus", "flat", "w_square"), "linear"),
        "gamma": "linear",
        "alpha_beta": "convolution",
    }
    kind = kinds.get(name, "product")
    results = []
    for rule in (name, RULES[name]):
        model = Everything()
        with lrp_prune.attributing(model, Composite("mine", {kind: rule}), unruled="ignore") as propagation:
            output = model(torch.linspace(-1, 1, 12).view(1, 3, 4))
            results.append((output.detach(), propagation.relevance(output.sum())["x"]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_a_composite_of_plain_gradients_is_the_plain_gradient_and_reports_nothing() -> None:
    """Also with dropout off, and however it is written."""
    model, x = Everything().train(), torch.randn(2, 3, 4)
    model.drop.eval()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
    model.drop.train()
    state = torch.get_rng_state()
    for composite in ("gradient", Composite("mine"), Composite("mine", {kind: "gradient" for kind in KINDS})):
        with lrp_prune.attributing(model, composite, unruled="error") as propagation:
            relevance = propagation.relevance(model(x).square().sum())["x"]
        torch.testing.assert_close(relevance, x * expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_kinds_and_rules_that_are_never_asked_are_refused() -> None:
    for kind in ("embedding", "join"):
        with pytest.raises(ValueError, match=rf"composite 'mine': unknown kind of operation '{kind}'.*needs no rule"):
            Composite("mine", {kind: "gradient"})
    with pytest.raises(
        ValueError, match=r"unknown kind of operation 'activations', expected one of \('activation'.*\)$"
    ):
        Composite("mine", {"activations": "identity"})
    with pytest.raises(ValueError, match=r"composite 'mine': unknown rule 'nothing', expected one of .*'identity'"):
        Composite("mine", {"activation": "nothing"})


def test_a_rule_knows_the_module_that_runs_in_each_batch() -> None:
    seen: list[str] = []

    def rule(call: Call) -> Any:
        seen.append(call.name)
        return rules.identity(call)

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh()))
    x = torch.ones(1, 4)
    lrp_prune.attribute(
        model, [x, x], lambda m, b: m(b).sin().sum(), Composite("mine", {"softmax": rule, "activation": rule})
    )
    assert seen == ["1.0", "1.0"]


def test_a_rule_knows_the_module_that_runs_beside_one_that_failed_before_it_ran() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.risky = nn.Tanh()
            self.risky.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("not now")))

        def forward(self, x: Tensor) -> Tensor:
            with pytest.raises(RuntimeError, match="not now"):
                self.risky(x)
            return torch.sin(x)

    seen: list[str] = []

    def rule(call: Call) -> Any:
        seen.append(call.name)
        return rules.identity(call)

    model = nn.Sequential(Careful(), nn.Sigmoid())
    with lrp_prune.attributing(model, Composite("mine", {"activation": rule})):
        model(torch.ones(1, 4))
    assert seen == ["0", "1"]


def test_a_rule_knows_the_module_that_runs_also_after_an_error_and_in_layers_that_are_recomputed() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.inner(x))

    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.broken = nn.ModuleList([Layer(), Layer()]), False

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            if self.broken:
                raise RuntimeError("after the layers")
            return torch.sin(x)

    seen: list[tuple[str, str]] = []

    def rule(call: Call) -> Any:
        seen.append((call.function.__name__, call.name))
        return rules.identity(call)

    model, layers = Recomputed(), [("tanh", "layers.0"), ("tanh", "layers.1")]
    with lrp_prune.attributing(model, Composite("mine", {"activation": rule})) as propagation:
        model.broken = True
        with pytest.raises(RuntimeError, match="after the layers"):
            model(torch.ones(1, 4))
        model.broken, seen[:] = False, []
        propagation.relevance(model(torch.ones(1, 4)).sum())
    assert seen == [*layers, ("sin", ""), *reversed(layers)]
