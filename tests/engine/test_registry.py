"""Rules that users add: what each kind of them does, for whom it can be asked, and that it can be taken back."""

import doctest
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Composite
from lrp_prune.attribution import Gamma, Rule, UnruledOperationError
from lrp_prune.engine import registry
from lrp_prune.engine.call import Call
from lrp_prune.engine.operations import OPERATIONS


class Middle(nn.Module):
    """A function between two layers, without biases."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6, bias=False), nn.Linear(6, 2, bias=False)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.between(self.first(x)))
        return result


X = torch.tensor([[1.0, -2.0, 0.5, 3.0]])


def _tables() -> tuple[Any, ...]:
    return (
        dict(OPERATIONS),
        dict(registry.REGISTERED),
        set(registry.ACTIVATION_MODULES),
        dict(registry.MODULE_RULES),
    )


def _explained(model: nn.Module, composite: str = "attnlrp") -> tuple[Tensor, Tensor]:
    with lrp_prune.attributing(model, composite, unruled="error") as propagation:
        value = model(X).sum()
        return value.detach(), propagation.relevance(value)["x"].sum()


def _digamma(x: Tensor) -> Tensor:
    return torch.digamma(x.abs() + 1)


@pytest.mark.parametrize("rule", ["activation", "identity"])
def test_a_function_has_the_rule_of_a_kind_or_a_rule_by_name(rule: str) -> None:
    """A kind has the rule that the composite has for it; a rule is itself under every composite."""
    model = Middle(torch.digamma)
    with pytest.raises(UnruledOperationError, match="digamma"):
        _explained(model)
    with lrp_prune.register_rule(torch.digamma, rule):
        value, total = _explained(model)
        torch.testing.assert_close(total, value)
        value, total = _explained(model, "gradient")
        if rule == "identity":
            torch.testing.assert_close(total, value)
        else:
            leaf = X.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(model(leaf).sum(), leaf)
            torch.testing.assert_close(total, (gradient * leaf).sum().detach())
            assert abs(float(total - value)) > 0.01


@pytest.mark.parametrize(("kind", "shares"), [("product", (0.5, 0.5)), ("division", (1.0, 0.0))])
def test_a_kind_of_several_operands_takes_the_first_ones(kind: str, shares: tuple[float, float]) -> None:
    class Angle(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.atan2(x, y)

    model, leaves = (
        Angle(),
        [torch.tensor([2.0, -3.0], requires_grad=True), torch.tensor([1.5, 2.5], requires_grad=True)],
    )
    plain = torch.autograd.grad(torch.atan2(*leaves).sum(), leaves)
    x, y = (leaf.detach() for leaf in leaves)
    with lrp_prune.register_rule(torch.atan2, kind), lrp_prune.attributing(model, unruled="error") as propagation:
        relevance = propagation.relevance(model(x, y).sum())
    for name, value, gradient, share in zip("xy", (x, y), plain, shares, strict=True):
        torch.testing.assert_close(relevance[name], share * value * gradient)


def test_a_rule_of_ones_own_gets_detached_parameters_and_computes_the_result() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.atan2(x, self.scale)

    seen: list[Any] = []

    def rule(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        seen.append((function, type(args[1]), args[1].requires_grad, kwargs))
        return 3 * args[0] + (function(*args) - 3 * args[0]).detach()

    model = Scaled()
    with lrp_prune.register_rule(torch.atan2, rule), lrp_prune.attributing(model, unruled="error") as propagation:
        output = model(X)
        torch.testing.assert_close(output, torch.atan2(X, model.scale))
        torch.testing.assert_close(propagation.relevance(output.sum())["x"], 3 * X)
    assert seen == [(torch.atan2, Tensor, False, {})]


class Own(nn.Module):
    """An activation of several operations, one of them without a rule."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.digamma(x.abs() + 1)


def test_a_class_of_activations_is_ruled_as_a_whole() -> None:
    model = Middle(Own())
    with lrp_prune.register_rule(Own, "activation"):
        value, total = _explained(model)
        torch.testing.assert_close(total, value)
    with pytest.raises(UnruledOperationError, match=r"digamma in between \(Own\)"):
        _explained(model)


def _kernel(x: Tensor) -> Tensor:
    return 2 * x


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _kernel(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Doubled.apply(x)


def test_a_class_can_keep_its_own_gradient_or_have_a_rule_of_ones_own() -> None:
    model = Middle(Doubled())
    with pytest.raises(UnruledOperationError, match=r"_Doubled in between \(Doubled\)"):
        _explained(model)
    with lrp_prune.register_rule(Doubled, "gradient"):
        value, total = _explained(model)
        torch.testing.assert_close(total, value)

    def tripled(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (x,) = args
        return 3 * x + (forward(x) - 3 * x).detach()

    with lrp_prune.register_rule(Doubled, tripled):
        same, total = _explained(model)
        assert same == value
        torch.testing.assert_close(total, 1.5 * value)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_rule_is_taken_back_and_what_was_there_before_is_there_again() -> None:
    before = _tables()
    with pytest.raises(RuntimeError, match="inside"), lrp_prune.register_rule(torch.digamma, "identity"):
        raise RuntimeError("inside")
    assert _tables() == before
    handles = [
        lrp_prune.register_rule(torch.relu, "stop"),
        lrp_prune.register_rule(torch.relu, "identity"),
        lrp_prune.register_rule(torch.digamma, "activation"),
        lrp_prune.register_rule(nn.GELU, "gradient"),
        lrp_prune.register_rule(Own, "activation"),
        lrp_prune.register_rule(Own, "activation"),
    ]
    assert registry.REGISTERED[torch.relu] is registry.RULES["identity"]
    for handle in reversed(handles):
        handle.remove()
        if handle is handles[1]:
            assert registry.REGISTERED[torch.relu] is registry.RULES["stop"]
        if handle is handles[5]:
            assert Own in registry.ACTIVATION_MODULES
    assert _tables() == before
    later = lrp_prune.register_rule(torch.relu, "stop")
    handles[0].remove()  # for the second time
    assert registry.REGISTERED[torch.relu] is registry.RULES["stop"]
    later.remove()
    assert _tables() == before


def _python_function(x: Tensor) -> Tensor:
    return torch.digamma(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_what_no_rule_can_be_asked_for_is_refused() -> None:
    before = _tables()
    for function in (_Doubled.apply, torch.jit.script(_python_function)):
        with pytest.raises(ValueError, match=r"is hidden from the rules .* register the class of the module"):
            lrp_prune.register_rule(function, "identity")
    for function in (
        _python_function,
        F.fractional_max_pool2d,
    ):  # which hands on to another one before any mode is asked
        with pytest.raises(ValueError, match=r"\w+ is a Python function, which the rules look into"):
            lrp_prune.register_rule(function, "identity")
    with pytest.raises(ValueError, match="what digamma normalises over cannot be told"):
        lrp_prune.register_rule(torch.digamma, "normalization")
    with pytest.raises(
        ValueError, match=r"rule must be a callable, a kind \(.*\) or a rule \(.*\), got 'no such rule'"
    ):
        lrp_prune.register_rule(torch.digamma, "no such rule")
    for kind, rule in ((Own, "product"), (int, "activation"), (int, "gradient")):
        with pytest.raises(ValueError, match=rf"a module class is registered as .* got '{rule}' for {kind.__name__}"):
            lrp_prune.register_rule(kind, rule)
    assert _tables() == before
    # F.normalize is a Python function as well, but asks for overrides itself.
    lrp_prune.register_rule(F.normalize, "identity").remove()


def test_a_rule_object_is_registered_as_it_is() -> None:
    """By itself or by its name, and it knows the operands of the function; in a composite it is the same."""
    layer, x = nn.Conv2d(2, 3, 3, bias=False), torch.randn(1, 2, 4, 4)
    found = []

    def add(composite: Any) -> None:
        with lrp_prune.attributing(layer, composite) as propagation:
            found.append(propagation.relevance(layer(x).square().sum())["input"])

    for rule in (Gamma(0.25), "gamma"):
        with lrp_prune.register_rule(torch.conv2d, rule):
            add("attnlrp")
    add(Composite("gamma", {"convolution": Gamma(0.25)}))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])
    with lrp_prune.attributing(layer) as propagation:
        assert not torch.allclose(propagation.relevance(layer(x).square().sum())["input"], found[0], rtol=1e-3)


@pytest.mark.parametrize("padding", [0, 1])
def test_the_gamma_rule_of_the_example_is_that_of_the_paper(padding: int) -> None:
    """Each output's relevance in proportion to the contributions, those of its own sign favoured; in float64, one by one."""
    (example,) = doctest.DocTestFinder(recurse=False).find(lrp_prune.register_rule, "register_rule")
    scope: dict[str, Any] = {"torch": torch}
    exec("".join(line.source for line in example.examples if "def gamma_rule" in line.source), scope)
    gamma, layer = 0.25, nn.Conv2d(2, 3, 3, padding=padding, bias=False).double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    with lrp_prune.register_rule(torch.conv2d, scope["gamma_rule"]), lrp_prune.attributing(layer) as propagation:
        output = layer(x)
        torch.testing.assert_close(output, layer(x))
        found = propagation.relevance((output.square() / 2).sum())["input"]
    # The layer as a matrix: contributions [outputs, inputs].
    matrix = torch.stack([layer(unit.view_as(x)).detach().flatten() for unit in torch.eye(32, dtype=torch.float64)], 1)
    contributions = matrix * x.flatten()
    z = contributions.sum(1)
    same_sign = contributions * z.sign()[:, None] > 0
    favoured = contributions * (1 + gamma * same_sign)
    expected = favoured / favoured.sum(1, keepdim=True) * z.square()[:, None]
    torch.testing.assert_close(found, expected.sum(0).view_as(x))


def test_a_registered_rule_knows_its_module_in_every_batch() -> None:
    seen: list[tuple[str, str]] = []

    class Looks(Rule):
        def __call__(self, call: Call) -> Any:
            seen.append((call.name, type(call.module).__name__))
            return call.run()

        @property
        def needs(self) -> frozenset[str]:
            return frozenset({"places"})

    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    batches = [(torch.randn(3, 4), torch.tensor([0, 1, 0]))] * 3
    with lrp_prune.register_rule(torch.tanh, Looks()):
        lrp_prune.attribute(model, batches, target="class", composite="gradient", unruled="ignore")
    assert seen == [("1", "Tanh")] * 3


@pytest.mark.parametrize("function", [torch.relu, F.layer_norm], ids=lambda function: function.__name__)
@pytest.mark.parametrize("rule", ["gamma", Gamma()], ids=str)
def test_rules_of_products_are_for_products(function: Callable[..., Any], rule: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"Gamma.* is a rule for \('linear', 'convolution'\), and {function.__name__} is"
    ):
        lrp_prune.register_rule(function, rule)
