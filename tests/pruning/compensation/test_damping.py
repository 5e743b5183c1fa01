"""Of few samples the damping is what makes one half of them good for the other; of many it is small."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrp_prune.pruning import LeastSquares, Masks, OptimalBrainSurgeon
from lrp_prune.pruning.compensation import Compensation, compensate_
from lrp_prune.pruning.compensation.damping import STRENGTHS
from tests.support.sharding import together

WIDTH = 24


def clean(rows: int) -> Tensor:
    """Inputs of few directions, which few samples tell."""
    return torch.randn(rows, 4).double() @ torch.randn(4, WIDTH).double() + 0.01 * torch.randn(rows, WIDTH).double()


def independent(rows: int) -> Tensor:
    """Inputs that say nothing of each other, so that whatever is found in few of them is chance."""
    return torch.randn(rows, WIDTH).double()


def uneven(rows: int) -> Tensor:
    """Of which one half tells little of the other, and that more."""
    common = clean(rows)
    common[: rows // 2] += 0.7 * independent(rows // 2)
    return common


def layer(outputs: int = 8) -> tuple[nn.Module, Masks]:
    model = nn.Sequential(nn.Linear(WIDTH, outputs)).double()
    return model, Masks({"0.weight": torch.rand(outputs, WIDTH) > 0.5})


def cross_validated(x: Tensor, model: nn.Module, masks: Masks) -> float:
    """The best strength, from least squares of each output on its own by the rows themselves."""
    ones, errors = torch.cat([x, torch.ones(len(x), 1).to(x)], 1), []
    middle = len(x) // 2
    for strength in STRENGTHS:
        errors.append(0.0)
        for fitted, judged in ((ones[:middle], ones[middle:]), (ones[middle:], ones[:middle])):
            for row, bias, kept in zip(model[0].weight, model[0].bias, masks["0.weight"], strict=True):
                dense, chosen = torch.cat([row, bias[None]]).detach(), torch.cat([kept, torch.tensor([True])])
                delta = strength * float(fitted[:, :-1].square().sum(0).mean())
                held = delta**0.5 * torch.eye(int(chosen.sum())).to(x)
                left = torch.cat([fitted[:, chosen], held])
                right = torch.cat([fitted @ dense, delta**0.5 * dense[chosen]])
                found = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
                errors[-1] += float((judged[:, chosen] @ found - judged @ dense).square().sum())
    return STRENGTHS[errors.index(min(errors))]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", [clean, independent, uneven])
@pytest.mark.parametrize("way", [LeastSquares, OptimalBrainSurgeon])
def test_it_is_that_of_two_fold_cross_validation(seed: int, kind: Any, way: type[Compensation]) -> None:
    torch.manual_seed(seed)
    (model, masks), x = layer(), kind(40)
    best = cross_validated(x, model, masks)
    assert kind is uneven or (best == STRENGTHS[0]) == (kind is clean)
    other = copy.deepcopy(model)
    found, given = compensate_(model, masks, [x], way()), compensate_(other, masks, [x], way(damping=best))
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()), rtol=1e-4, atol=1e-6)
    assert found.held == ({} if best == STRENGTHS[0] else {"0.weight": best}) and not given.held
    assert (f"damped by up to {best:g}: 0.weight" in str(found)) == bool(found.held)


def test_of_many_samples_it_is_small() -> None:
    torch.manual_seed(0)
    (model, masks), x = layer(), independent(10 * WIDTH)
    other = copy.deepcopy(model)
    assert not compensate_(model, masks, [x], LeastSquares()).held
    compensate_(other, masks, [x], LeastSquares(damping=STRENGTHS[0]))
    assert torch.equal(model[0].weight, other[0].weight)
    assert compensate_(copy.deepcopy(other), masks, [x[:-1]], LeastSquares()).held


@pytest.mark.parametrize("groups", [2, 32])
def test_convolutions_in_groups_have_one_for_all(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(64, 64, 9, groups=groups))
    x, masks = torch.randn(4, 64, 12), Masks({"0.weight": torch.rand(64, 64 // groups, 9) > 0.6})
    assert compensate_(model, masks, [x], LeastSquares()).held == {"0.weight": pytest.approx(1, abs=2)}


def test_what_nothing_tells_is_held_most() -> None:
    """Only one of two batches of one sample reaches the layer."""

    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.second(hidden) if x.shape[1] > 20 else hidden[..., :4]

    torch.manual_seed(0)
    model = Some()
    masks = Masks({"second.weight": torch.rand(4, WIDTH) > 0.5})
    batches = [torch.randn(1, 30, WIDTH), torch.randn(1, 10, WIDTH)]
    assert compensate_(model, masks, batches, LeastSquares()).held == {"second.weight": STRENGTHS[-1]}


def test_batches_of_one_sample_are_halves_by_turns_in_all_processes(tmp_path: Path) -> None:
    """Two processes with one each have the halves that one process has of both."""
    torch.manual_seed(0)
    dense, masks = layer()
    common = clean(60)
    texts = [(common[start::2] + 0.5 * clean(30))[None] for start in range(2)]  # each of some directions of its own

    def call(mesh: Any) -> Any:
        model = copy.deepcopy(dense)
        found = compensate_(model, masks, [texts[mesh.get_local_rank()]], LeastSquares(), together=True)
        return found.held, model[0].weight.detach()

    (held, first), (same, second) = together(call, 2, tmp_path)
    assert held == same and torch.equal(first, second)
    alone = copy.deepcopy(dense)
    assert compensate_(alone, masks, texts, LeastSquares()).held == held
    assert STRENGTHS[0] < held["0.weight"] < STRENGTHS[-1]
    torch.testing.assert_close(alone[0].weight.detach(), first)
    mixed = compensate_(copy.deepcopy(dense), masks, [torch.stack(texts, 2).flatten(1, 2)], LeastSquares())
    assert not mixed.held  # where both halves have both, either tells all of the other
