"""Operations without a rule are reported by name and module, also those that are hidden from the rules; and only what matters."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.attribution import UnruledOperationError, UnruledOperationWarning
from tests.support.small_models import ARCHITECTURES, batch_for, build, forward


class Digamma(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.digamma(x.abs() + 1)


def _kernel(x: Tensor) -> Tensor:
    """Stands for what is not torch's, so that nobody looks into what calls it."""
    return torch.sigmoid(x)


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _kernel(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        y = torch.sigmoid(ctx.saved_tensors[0])
        return gradient * y * (1 - y)


class Hidden(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Sigmoid.apply(x)


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
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), middle, nn.Linear(6, 2))


def _run(model: nn.Module, unruled: str = "warn", composite: str = "attnlrp") -> dict[str, Tensor]:
    with lrp_prune.attributing(model, composite, unruled=unruled) as propagation:
        return propagation.relevance(model(torch.ones(2, 4)).sum())


@contextmanager
def nothing_is_reported() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnruledOperationWarning)
        yield


@pytest.mark.parametrize(
    ("middle", "operation"),
    [(Digamma(), "digamma"), (Hidden(), "_Sigmoid"), (Scripted(), "Sigmoid|DifferentiableGraph")],
)
def test_an_unruled_operation_is_named_with_its_module(middle: nn.Module, operation: str) -> None:
    with pytest.warns(UnruledOperationWarning, match=rf"({operation})\w* in 1 \({type(middle).__name__}\)"):
        _run(_model(middle))
    with pytest.raises(UnruledOperationError, match=operation):
        _run(_model(middle), "error")
    with nothing_is_reported():
        _run(_model(middle), "ignore")
        _run(_model(middle), composite="gradient")


def test_what_is_hidden_between_layers_of_one_module_is_blamed_on_that_module() -> None:
    """Not on the child that ends next, and although a rule follows in the very same module."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(_Sigmoid.apply(self.first(x))))

    model = nn.ModuleDict({"mixed": Mixed()})
    model.forward = lambda x: model["mixed"](x)  # type: ignore[method-assign]
    with pytest.warns(UnruledOperationWarning, match=r"_Sigmoid in mixed \(Mixed\)\. It is hidden") as caught:
        _run(model)
    assert "last" not in str(caught[0].message)

    class Direct(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(_Sigmoid.apply(self.first(x)))

    with pytest.warns(UnruledOperationWarning, match=r"_Sigmoid in <model> \(Direct\)"):
        _run(Direct())


def test_a_model_that_hides_everything_behind_one_function_is_reported() -> None:
    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return _Sigmoid.apply(x)

    with pytest.warns(UnruledOperationWarning, match=r"_Sigmoid in <model> \(Whole\)"):
        _run(Whole())


def test_only_what_the_explained_value_depends_on_is_reported() -> None:
    model, batch = build("llama"), batch_for("llama")

    def explained(what: Callable[[Any], Tensor]) -> None:
        with lrp_prune.attributing(model) as propagation:
            propagation.relevance(what(model(**batch, labels=batch["input_ids"], use_cache=False)))

    with nothing_is_reported():
        explained(lambda output: output.logits.sum())
    with pytest.warns(UnruledOperationWarning, match="cross_entropy_loss"):
        explained(lambda output: output.loss)


def test_each_forward_in_a_context_is_audited() -> None:
    model = _model(Digamma())
    with lrp_prune.attributing(model) as propagation:
        for _ in range(2):
            with pytest.warns(UnruledOperationWarning, match="digamma"):
                propagation.relevance(model(torch.ones(2, 4)).sum())
        first, second = model(torch.ones(2, 4)), model(torch.zeros(2, 4))
        with pytest.warns(UnruledOperationWarning, match="digamma"):
            propagation.relevance(first.sum() - second.sum())


def test_collecting_reports_in_its_first_batch() -> None:
    model = _model(Hidden())
    with pytest.warns(UnruledOperationWarning, match=r"_Sigmoid in 1 \(Hidden\)") as caught:
        lrp_prune.attribute(
            model, [torch.ones(2, 4), torch.ones(3, 4)], lambda model, batch: model(batch).sum(), "attnlrp"
        )
    assert len([entry for entry in caught if entry.category is UnruledOperationWarning]) == 1
    with pytest.raises(UnruledOperationError, match="_Sigmoid"):
        lrp_prune.attribute(
            model, [torch.ones(2, 4)], lambda model, batch: model(batch).sum(), "attnlrp", unruled="error"
        )


def test_a_parametric_relu_needs_no_rule_besides_its_own() -> None:
    """Its gradient is f(x)/x: by hand, gradient x input of the network, which is linear around x."""
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.PReLU(6), nn.Linear(6, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(6))
    x = torch.randn(2, 4)
    slope = torch.where(x @ model[0].weight.T > 0, 1.0, model[1].weight)
    expected = x * ((model[2].weight.sum(0) * slope) @ model[0].weight)
    for composite in ("gradient", "attnlrp", "cp_lrp", "epsilon"):
        with lrp_prune.attributing(model, composite, unruled="error") as propagation:
            value = model(x).sum()
            relevance = propagation.relevance(value)["input"]
        torch.testing.assert_close(relevance.sum(), value)
        torch.testing.assert_close(relevance, expected.detach())


def test_relevance_that_stops_at_quantized_layers_is_said_to() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantized, self.plain = quantized, nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.quantized(x) + self.plain(x)

    model, x = Beside(), torch.ones(1, 4)
    with lrp_prune.attributing(model) as propagation:
        output = model(x)
        expected = (
            r"no relevance goes through: quantized\.linear_dynamic in quantized\.0 \(Linear\)\. It has no gradient"
        )
        with pytest.warns(UserWarning) as caught:
            relevance = propagation.relevance(output.sum())
    told = [str(entry.message) for entry in caught if entry.category is UnruledOperationWarning]
    assert len(told) == 1 and "plain gradient is used" not in told[0]
    assert re.match(expected, told[0])
    torch.testing.assert_close(relevance["x"].sum(), model.plain(x).sum())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_known_architectures_have_a_rule_for_everything(name: str, attention: str) -> None:
    model, batch = build(name, attention), batch_for(name)
    with lrp_prune.attributing(model, unruled="error") as propagation:
        propagation.relevance(forward(model, batch).sum())


class _Apart(nn.Module):
    """Is made of modules that a target of its own puts together."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).relu())


@pytest.mark.parametrize("between", [torch.relu, torch.tanh])
def test_what_is_computed_between_forwards_is_told_and_what_is_behind_it_is_not(
    between: Callable[[Tensor], Tensor],
) -> None:
    model, x = _Apart(), torch.randn(5, 4)

    def target(model: nn.Module, batch: Tensor) -> Tensor:
        return model.head(between(model.encoder(batch)))[:, 0].sum()

    if between is torch.relu:
        relevance = lrp_prune.attribute(model, [x], target=target, unruled="error")
        expected = lrp_prune.attribute(model, [x], target=lambda model, batch: model(batch)[:, 0].sum())
        for name in expected:
            torch.testing.assert_close(relevance[name], expected[name])
        return
    with pytest.warns(UnruledOperationWarning, match="outside of the model's forward: TanhBackward0 in") as told:
        lrp_prune.attribute(model, [x], target=target)
    assert not any("_Observed" in str(warning.message) for warning in told)


class _Keeps(nn.Module):
    """Goes on from what it computed before, which is no argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.kept = nn.Sequential(nn.Linear(4, 4), nn.GELU()), None

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.kept is not None:
            x = x + self.kept
        self.kept = x  # type: ignore[assignment]
        return x


def test_what_an_earlier_forward_left_behind_is_accounted_for() -> None:
    model = _Keeps()
    with lrp_prune.attributing(model, unruled="error") as propagation:
        model(torch.randn(2, 4))
        propagation.relevance(model(torch.randn(2, 4)).sum())
    llama = build("llama")
    ids = batch_for("llama")["input_ids"]
    with lrp_prune.attributing(llama, unruled="error") as propagation:
        first = llama(input_ids=ids, use_cache=True)
        second = llama(input_ids=ids[:, :1], past_key_values=first.past_key_values)
        propagation.relevance(second.logits[:, -1].max(-1).values.sum())


def test_the_audit_lets_go_of_the_graph() -> None:
    """What was found is kept until it is told, and of other forwards nothing."""
    model, freed = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), []
    with lrp_prune.attributing(model) as propagation:
        for _ in range(2):
            output = model(torch.ones(1, 4))
            output.grad_fn.metadata["held"] = _Flag(freed)
            del output
        assert freed == [True, True]
        propagation.roots()
    model, freed = _model(Digamma()), []
    with lrp_prune.attributing(model) as propagation:
        value = model(torch.ones(1, 4)).sum()
        value.grad_fn.next_functions[0][0].next_functions[1][0].metadata["held"] = _Flag(freed)
        with pytest.warns(UnruledOperationWarning, match="digamma"):
            propagation.relevance(value)
        del value
        assert freed == [True]


class _Flag:
    """Tells when it is gone."""

    def __init__(self, gone: list[bool]) -> None:
        self._gone = gone

    def __del__(self) -> None:
        self._gone.append(True)


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
                a.clamp_(max=1.0).abs_().sqrt_()
                return a
            return (a * y + x).clamp(max=1.0).abs().sqrt()

    x, y = torch.randn(3, 4), torch.randn(3, 4)
    for composite in ("attnlrp", "cp_lrp", "epsilon"):
        results = []
        for in_place in (False, True):
            model = InPlace(in_place)
            with lrp_prune.attributing(model, composite, unruled="error") as propagation:
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
    with (
        pytest.raises(ValueError, match=r"unruled must be one of .*got 'raise'"),
        lrp_prune.attributing(model, unruled="raise"),
    ):
        pass
    with lrp_prune.attributing(model) as propagation:
        output = model(torch.ones(1, 2))
        with pytest.raises(ValueError, match=r"must be a scalar tensor, got a tensor of shape \(1, 2\)"):
            propagation.relevance(output)
        with pytest.raises(ValueError, match="must be a scalar tensor, got float"):
            propagation.relevance(output.sum().item())  # type: ignore[arg-type]
