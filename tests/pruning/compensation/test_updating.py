"""Systems that rounding makes singular are solved with more damping, and never to something worse than the mask."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lrp_prune.pruning import LeastSquares, Masks, OptimalBrainSurgeon
from lrp_prune.pruning.compensation import Compensation, compensate_
from tests.support.compensation import half


@pytest.mark.parametrize("way", [LeastSquares, OptimalBrainSurgeon])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_that_hardly_differ_raise_the_damping_and_are_told(way: type[Compensation], dtype: torch.dtype) -> None:
    """What rounding makes singular is solved with as little more damping as it takes, on scales that are far apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8)).to(dtype)
    x = (torch.randn(400, 3) @ torch.randn(3, 64) * torch.logspace(-3, 4, 64)).to(dtype)
    masks, dense, masked = half(model, ["0.weight", "2.weight"]), copy.deepcopy(model), copy.deepcopy(model)
    masks.apply_(masked)
    found = compensate_(model, masks, [x], way(damping=1e-12))
    if dtype is torch.float32:  # where inputs are not rounded so far that they differ by it
        assert "damping was raised, up to 1" in str(found) and all(times >= 10 for times in found.damped.values())
    errors = [float((entry(x) - dense(x)).float().square().mean()) for entry in (model, masked)]
    assert (
        errors[0] < errors[1]
        and not found.left_out
        and all(bool(torch.isfinite(value).all()) for value in model.parameters())
    )
    again = copy.deepcopy(dense)
    assert not compensate_(again, masks, [x], way(damping=0.01)).damped


class Wrong(LeastSquares):
    """Whatever the damping, its weights are worse than the mask's."""

    def solve(self, gram: Tensor, cross: Tensor, kept: Tensor, weight: Tensor) -> Tensor:
        return -100 * weight * kept


def test_what_no_damping_helps_is_only_masked_and_named() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(40, 8)
    masks, masked = half(model, ["0.weight"]), copy.deepcopy(model)
    masks.apply_(masked)
    found = compensate_(model, masks, [x], Wrong())
    assert found.left_out == {"0.weight": "has inputs that no damping tells apart in their precision"}
    assert not found.errors and not found.damped
    assert torch.equal(model[0].weight, masked[0].weight) and torch.equal(model[0].bias, masked[0].bias)


@pytest.mark.parametrize("dense", [0.0, 0.5, 1.0])
def test_a_bias_makes_up_for_inputs_that_are_gone(dense: float) -> None:
    """Nothing comes into the second layer any more, whose least squares are a bias of the mean of the targets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 3)).double()
    original, x = copy.deepcopy(model), torch.randn(64, 6).double() + 1
    masks = Masks({"0.weight": torch.zeros(6, 6, dtype=torch.bool), "1.weight": torch.rand(3, 6) > 0.5})
    found = compensate_(model, masks, [x], LeastSquares(dense=dense))
    theirs, ours = original(x), model[0](x)
    assert not ours.any()
    target = dense * theirs + (1 - dense) * original[1](ours)
    torch.testing.assert_close(model(x).mean(0), target.mean(0))
    assert not model[1].weight[~masks["1.weight"]].any() and "1.weight" in found.errors
