"""Processes that compensate one model together come to what one process comes to on all of their batches."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.pruning import LeastSquares, scorer
from lrp_prune.pruning.compensation import Compensated, compensate_
from lrp_prune.pruning.compensation.ways import Compensation
from tests.support.compensation import EXACT, WAYS, half, mlp
from tests.support.sharding import together
from tests.support.small_models import build

pytestmark = pytest.mark.processes


def compensated(
    model: nn.Module, masks: Any, each: list[list[Any]], way: Compensation, directory: Path
) -> list[tuple[dict[str, Tensor], Compensated]]:
    """What each process comes to with its own batches."""

    def call(mesh: Any) -> Any:
        mine = copy.deepcopy(model)
        found = compensate_(mine, masks, each[mesh.get_local_rank()], way, together=True)
        return {name: value.detach() for name, value in mine.named_parameters()}, found

    return together(call, len(each), directory)


def alone(model: nn.Module, masks: Any, batches: list[Any], way: Compensation) -> tuple[nn.Module, Compensated]:
    mine = copy.deepcopy(model)
    return mine, compensate_(mine, masks, batches, way)


def check_equal(
    model: nn.Module, found: Compensated, theirs: list[tuple[dict[str, Tensor], Compensated]], tolerance: float = 1e-8
) -> None:
    for values, result in theirs:
        assert result.left_out == found.left_out and result.samples == found.samples
        assert list(result.errors) == list(found.errors)
        for name, value in model.named_parameters():
            assert torch.equal(values[name], theirs[0][0][name]), name
            torch.testing.assert_close(values[name], value.detach(), rtol=tolerance, atol=tolerance / 100, msg=name)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_whatever_batches_each_has(tmp_path: Path, way: Compensation) -> None:
    """One has more of them, and of other sizes."""
    model, batches = mlp()
    masks = half(model, ["0.weight", "2.weight", "4.weight"])
    each = [batches, [(batches[0][0][:20] + 1, batches[0][1][:20])]]
    check_equal(*alone(model, masks, [*each[0], *each[1]], way), compensated(model, masks, each, way, tmp_path))


def test_few_samples_in_each_are_many_together(tmp_path: Path) -> None:
    model, (batch, *_) = mlp()
    masks = half(model, ["0.weight", "2.weight", "4.weight"])
    each = [[tuple(entry[start : start + 10] for entry in batch)] for start in (0, 10)]
    model, found = alone(model, masks, [*each[0], *each[1]], EXACT)
    check_equal(model, found, compensated(mlp()[0], masks, each, EXACT, tmp_path))
    assert not found.left_out


class Routed(nn.Module):
    """Each sample goes to one of three experts, and a process may have none for some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(6, 6) for _ in range(3)]) for _ in range(2)])
        self.rare, self.tied = nn.Linear(3, 3), nn.Linear(3, 3)
        self.tied.weight = self.rare.weight

    def forward(self, x: Tensor) -> Tensor:
        kinds = x[:, 0].round().long()
        x = self.first(x[:, 1:])
        for experts in self.blocks:
            made = torch.zeros_like(x)
            for kind, expert in enumerate(experts):
                if bool((kinds == kind).any()):
                    made[kinds == kind] = expert(x[kinds == kind]).relu()
            x = x + made
        x = self.last(x)
        if bool((kinds == 2).any()):
            x = self.tied(self.rare(x))
        return x


def test_what_only_some_processes_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Routed().double()
    names = [name for name, value in model.named_parameters() if value.dim() > 1]
    x = torch.randn(3, 40, 6).double()
    each = [[torch.cat([torch.full((40, 1), kind).double(), x[kind]], 1) for kind in kinds] for kinds in ((0,), (1, 2))]
    whole = [torch.cat([torch.cat(theirs) for theirs in each])]
    model, found = alone(model, half(model, names), whole, EXACT)
    assert set(found.left_out) == {"rare.weight"} and len(found.errors) == len(names) - 1
    torch.manual_seed(0)
    fresh = Routed().double()
    theirs = compensated(fresh, half(fresh, names), each, EXACT, tmp_path)
    for values, result in theirs:
        assert set(result.left_out) == {"rare.weight"} and set(result.errors) == set(found.errors)
        for name, value in model.named_parameters():
            assert torch.equal(values[name], theirs[0][0][name]), name
            if not name.startswith(("rare", "tied")):
                torch.testing.assert_close(values[name], value.detach(), rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize(("name", "tolerance"), [("llama", 1e-8), ("mixtral", 1e-3)])
def test_transformers(tmp_path: Path, name: str, tolerance: float) -> None:
    torch.manual_seed(0)
    model = build(name).to(torch.float64 if name == "llama" else torch.float32)  # torch groups experts in float32
    way = LeastSquares(damping=0.1, steps=500, tolerance=1e-12 if name == "llama" else 1e-7)
    masks = lrp_prune.select(scorer("random", model).compute(), 0.5, scope="layer")
    each = [[{"input_ids": torch.randint(2, 50, (samples, 12))} for samples in sizes] for sizes in ((4, 4, 2), (4,))]
    expected = alone(model, masks, [*each[0], *each[1]], way)
    check_equal(*expected, compensated(model, masks, each, way, tmp_path), tolerance)


def test_an_error_in_one_process_is_told_to_all(tmp_path: Path) -> None:
    model, batches = mlp()
    masks = half(model, ["0.weight", "2.weight", "4.weight"])
    broken = [(torch.full_like(batches[0][0], float("nan")), batches[0][1])]
    wrong = [*batches, (batches[0][0][:, :5], batches[0][1])]

    def call(mesh: Any) -> None:
        first = mesh.get_local_rank() == 0
        for theirs, message in ((broken, "are not finite"), ([], "no batch was seen"), (wrong, "shapes")):
            mine, changed = copy.deepcopy(model), list[Any]()
            with pytest.raises((FloatingPointError, ValueError, RuntimeError), match=message):
                compensate_(
                    mine, masks, batches if first else theirs, EXACT, None, False, changed.extend, together=True
                )
            for parameter, other in zip(mine.parameters(), model.parameters(), strict=True):
                known = any(entry is parameter for entry in changed)
                assert known or torch.equal(parameter, other)

    together(call, 2, tmp_path)
