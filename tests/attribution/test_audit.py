"""Operations without a rule are reported by name and module; users add rules."""

import warnings

import pytest
import torch
from small_models import ARCHITECTURES, batch_for, build, forward
from torch import Tensor, nn

import lrp_prune
from lrp_prune.attribution import UnruledOperationError, UnruledOperationWarning
from lrp_prune.attribution.operations import OPERATIONS
from lrp_prune.attribution.registry import ACTIVATION_MODULES, REGISTERED


class Digamma(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.digamma(x.abs() + 1)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient * 3 * ctx.saved_tensors[0] ** 2


class Hidden(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Cube.apply(x)


def _scripted_gate(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.gate = torch.jit.script(_scripted_gate)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x)


def _model(middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), middle, nn.Linear(6, 2))


def _run(model: nn.Module, unruled: str = "warn") -> dict[str, Tensor]:
    with lrp_prune.attributing(model, unruled=unruled) as propagation:
        return propagation.relevance(model(torch.ones(2, 4)).sum())


@pytest.mark.parametrize(
    ("middle", "operation"), [(Digamma(), "digamma"), (Hidden(), "_Cube"), (Scripted(), "Sigmoid|DifferentiableGraph")]
)
def test_an_unruled_operation_is_named_with_its_module(middle: nn.Module, operation: str) -> None:
    with pytest.warns(UnruledOperationWarning, match=rf"({operation}).* in 1 \({type(middle).__name__}\)"):
        _run(_model(middle))
    with pytest.raises(UnruledOperationError, match=operation):
        _run(_model(middle), "error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _run(_model(middle), "ignore")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_known_architectures_have_a_rule_for_everything(name: str, attention: str) -> None:
    model, batch = build(name, attention), batch_for(name)
    with lrp_prune.attributing(model, unruled="error") as propagation:
        propagation.relevance(forward(model, batch).sum())


def test_a_function_is_registered_by_kind_by_rule_or_with_an_own_rule() -> None:
    model, x = _model(Digamma()), torch.ones(2, 4)
    try:
        for rule in ("activation", "identity"):
            lrp_prune.register_rule(torch.digamma, rule)
            with lrp_prune.attributing(model, unruled="error", latent=["0", "1"]) as propagation:
                relevance = propagation.relevance(model(x).sum())
            torch.testing.assert_close(relevance["1"].sum(), relevance["2" if "2" in relevance else "1"].sum())
            OPERATIONS.pop(torch.digamma, None), REGISTERED.pop(torch.digamma, None)
        lrp_prune.register_rule(torch.digamma, lambda function, args, kwargs: function(*args, **kwargs).detach())
        with lrp_prune.attributing(model, unruled="error") as propagation:
            value = model(x).sum()
            with pytest.raises(ValueError, match="does not depend"):
                propagation.relevance((value * 0).detach())
    finally:
        OPERATIONS.pop(torch.digamma, None), REGISTERED.pop(torch.digamma, None)
    with pytest.raises(ValueError, match="rule must be"):
        lrp_prune.register_rule(torch.digamma, "no such rule")


def test_an_activation_module_is_registered_as_a_whole() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(2 * x)

    model = nn.Sequential(nn.Linear(4, 6, bias=False), Own(), nn.Linear(6, 2, bias=False))
    x = torch.ones(2, 4)

    def relevance() -> tuple[Tensor, Tensor]:
        with lrp_prune.attributing(model, latent=["0"]) as propagation:
            value = model(x).sum()
            return value.detach(), propagation.relevance(value)["0"].sum()

    lrp_prune.register_rule(Own, "activation")
    try:
        value, total = relevance()
    finally:
        ACTIVATION_MODULES.discard(Own)
    torch.testing.assert_close(total, value)


def test_in_place_operations_have_the_rules_of_their_twins() -> None:
    class InPlace(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.in_place = in_place

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            a = torch.nn.functional.silu(x * 1.0, inplace=self.in_place)
            if self.in_place:
                a *= y
                a += x
                return a
            return a * y + x

    x, y = torch.randn(3, 4), torch.randn(3, 4)
    results = []
    for in_place in (False, True):
        model = InPlace(in_place)
        with lrp_prune.attributing(model, unruled="error") as propagation:
            results.append(propagation.relevance(model(x, y).square().sum()))
    for name in ("x", "y"):
        torch.testing.assert_close(results[0][name], results[1][name])


def test_wrong_arguments_are_named() -> None:
    model = nn.Linear(2, 2)
    with (
        pytest.raises(ValueError, match=r"composite must be one of .*attnlrp.*got 'lxt'"),
        lrp_prune.attributing(model, "lxt"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"latent pattern 'nope' matches no module"),
        lrp_prune.attributing(model, latent=["nope"]),
    ):
        pass
    with lrp_prune.attributing(model) as propagation:
        output = model(torch.ones(1, 2))
        with pytest.raises(ValueError, match=r"must be a scalar tensor, got a tensor of shape \(1, 2\)"):
            propagation.relevance(output)
    with pytest.raises(ValueError, match="unknown kind"):
        lrp_prune.Composite("mine", {"activations": "identity"})
    with pytest.raises(ValueError, match="unknown rule"):
        lrp_prune.Composite("mine", {"activation": "nothing"})
