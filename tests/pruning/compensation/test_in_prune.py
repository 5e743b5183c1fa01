"""Pruning and compensating in one call: masks, rounds, and a model that is as it was after an error."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.pruning import LeastSquares
from lrp_prune.pruning.compensation import compensate_
from tests.support.compensation import Twice, half, mlp


@pytest.mark.parametrize("scope", ["2:4", "row", "global"])
def test_in_one_call_the_masks_are_those_of_pruning_alone(scope: str) -> None:
    (alone, batches), (model, _) = mlp(), mlp()
    expected = lrp_prune.prune(alone, batches, 0.5, scope=scope, recalibrate=False, progress=False)
    found = lrp_prune.prune(model, batches, 0.5, scope=scope, compensation="exact", progress=False)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(model[0].weight, alone[0].weight)


def test_removed_units_are_made_up_for(caplog: pytest.LogCaptureFixture) -> None:
    """With all of theirs; biases go along with their layers, and are not named as if they had been left out."""
    (alone, batches), (model, _), (dense, _) = mlp(), mlp(), mlp()
    options: dict[str, Any] = {"granularity": "neuron", "progress": False}
    masks = lrp_prune.prune(alone, batches, 0.5, recalibrate=False, **options)
    lrp_prune.prune(model, batches, 0.5, compensation="exact", **options)
    x = batches[0][0]
    errors = [float((entry(x) - dense(x)).square().mean()) for entry in (model, alone)]
    assert errors[0] < 0.7 * errors[1]
    assert all(not model.get_parameter(name)[~masks[name]].any() for name in masks)
    assert masks.pruned_in("0.bias") and "only masked" not in caplog.text


def test_of_two_rounds_the_second_begins_with_the_dense_weights() -> None:
    (model, batches), (dense, _) = mlp(), mlp()
    masks = lrp_prune.prune(model, batches, 0.8, rounds=2, compensation="exact", progress=False)
    compensate_(dense, masks, batches, LeastSquares())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True))


def test_batches_that_can_be_gone_through_once() -> None:
    (model, batches), (other, _) = mlp(), mlp()
    lrp_prune.prune(model, batches, 0.5, compensation="exact", progress=False)
    lrp_prune.prune(other, iter(batches), 0.5, compensation="exact", progress=False)
    assert torch.equal(model[2].weight, other[2].weight)


def test_an_error_in_the_middle_leaves_the_model_as_it_was() -> None:
    (model, batches), (before, _) = mlp(), mlp()
    stopping = iter([False, True])

    class Failing(LeastSquares):
        def solve(self, *given: Any) -> Tensor:
            if next(stopping):
                raise KeyboardInterrupt
            return super().solve(*given)

    with pytest.raises(KeyboardInterrupt):
        lrp_prune.prune(model, batches, 0.5, compensation=Failing(), progress=False)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), before.parameters(), strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_error_puts_back_biases_that_lie_in_a_stack() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 8, 8)), nn.Parameter(torch.randn(3, 8))

        def forward(self, x: Tensor) -> Tensor:
            for weight, bias in zip(self.weight, self.bias, strict=True):
                x = nn.functional.linear(x, weight, bias).relu()
            return x

    class Failing(LeastSquares):
        def solve(self, *given: Any) -> Tensor:
            if not torch.equal(model.bias, before.bias):
                raise KeyboardInterrupt
            return super().solve(*given)

    torch.manual_seed(0)
    model = Stack()
    before = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        lrp_prune.prune(
            model, [torch.randn(64, 8)], 0.5, "magnitude", exclude=["bias"], compensation=Failing(), progress=False
        )
    assert torch.equal(model.bias, before.bias) and torch.equal(model.weight, before.weight)


def test_an_error_puts_back_what_is_in_no_stage_and_biases_of_others() -> None:
    class Lent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight, bias)

    class Lending(Twice):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.bias = Lent(), nn.Parameter(torch.randn(8))

        def before(self, x: Tensor) -> Tensor:
            return self.inner(super().before(x), self.bias)

    class Failing(LeastSquares):
        def solve(self, *given: Any) -> Tensor:
            if not torch.equal(model.bias, before.bias):
                assert not model.twice.weight.all()
                raise KeyboardInterrupt
            return super().solve(*given)

    torch.manual_seed(0)
    model = Lending()
    before = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        lrp_prune.prune(
            model, [torch.randn(64, 8)], 0.5, "magnitude", scope="layer", compensation=Failing(), progress=False
        )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), before.parameters(), strict=True))


def test_what_is_only_masked_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model, batches = mlp()
    lrp_prune.prune(model, [(x[:2], y[:2]) for x, y in batches], 0.5, rounds=2, compensation="exact", progress=False)
    (told,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told == "not compensated, only masked: *.weight (is reached by fewer than 16 samples or tokens)"


def test_inputs_that_are_not_finite_are_named_and_change_nothing() -> None:
    (model, batches), (before, _) = mlp(), mlp()
    broken = [(torch.full_like(x, float("inf")), y) for x, y in batches]
    with pytest.raises(FloatingPointError, match=r"0.weight are not finite"):
        lrp_prune.prune(model, broken, 0.5, "magnitude", compensation="obs", progress=False)
    assert torch.equal(model[0].weight, before[0].weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compensation": "best"}, "must be one of"),
        ({"compensation": 1}, "must be one of"),
        ({"compensation": "exact", "recalibrate": True}, "leave recalibrate as it is"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(options: dict[str, Any], message: str) -> None:
    (model, batches), (before, _) = mlp(), mlp()
    with pytest.raises(ValueError, match=message):
        lrp_prune.prune(model, batches, 0.5, progress=False, **options)
    assert torch.equal(model[0].weight, before[0].weight)


def test_without_batches_there_is_nothing_to_compensate_with() -> None:
    model, _ = mlp()
    with pytest.raises(ValueError, match="compensation needs batches"):
        lrp_prune.prune(model, (), 0.5, "magnitude", compensation="exact", progress=False)
    with pytest.raises(ValueError, match="needs reference samples"):
        compensate_(model, half(model, ["0.weight"]), [], LeastSquares())
