"""How a recalibration compares outputs: as the model and its first batch say, whatever the method is."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Masks
from lrp_prune.pruning import METHODS, recalibrate, scorer
from tests.support.sharding import together


def classifier() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 5))
    return model, [(3 * torch.randn(64, 12), torch.randint(5, (64,))) for _ in range(4)]


def masks_of(model: nn.Module, sparsity: float = 0.6) -> Masks:
    return lrp_prune.select(scorer("random", model).compute(), sparsity, scope="layer")


def test_all_methods_recalibrate_one_mask_alike(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, batches = classifier()
    masks, expected = masks_of(model), []
    monkeypatch.setattr(sys.modules["lrp_prune.pruning.prune"], "select", lambda *_, **__: masks)
    for method in METHODS:
        sparse = copy.deepcopy(model)
        caplog.clear()
        with caplog.at_level("INFO", "lrp_prune"):
            lrp_prune.prune(sparse, batches, 0.6, method, rounds=1)
        told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("round 1")]
        expected.append((told, sparse.state_dict()))
    found = recalibrate(model, masks, batches, "class")
    assert found.divergences != recalibrate(model, masks, batches, "").divergences
    for told, weights in expected:
        assert told == [f"round 1: {found}"]
        assert all(torch.equal(value, expected[0][1][name]) for name, value in weights.items())


def test_left_open_it_is_inferred_and_nothing_is_left_behind() -> None:
    model, batches = classifier()
    masks, state = masks_of(model), torch.get_rng_state()
    model.train()
    found = recalibrate(model, masks, batches)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert found.divergences == recalibrate(model, masks, batches, "class").divergences


def test_what_cannot_be_told_is_compared_by_squares_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model, batches = classifier()
    masks, inputs = masks_of(model), [(x,) for x, _ in batches]
    with caplog.at_level("INFO", "lrp_prune"):
        found = recalibrate(model, masks, inputs)
    assert found.divergences == recalibrate(model, masks, inputs, "").divergences
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.startswith("recalibration compares outputs by squares: what to explain cannot be inferred")


@pytest.mark.parametrize("method", ["wanda", "random"])
def test_what_runs_the_model_for_a_method_that_explains_nothing_may_give_anything(method: str) -> None:
    model, batches = classifier()

    def run(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"scores": model(batch[0]), "read": batch[1]}

    options: dict[str, Any] = {"granularity": "neuron"} if method == "random" else {}
    masks = lrp_prune.prune(model, batches, 0.5, METHODS[method](target=run), recalibrate=True, **options)  # type: ignore[call-arg]
    assert masks.sparsity == pytest.approx(0.5, abs=0.02)


@pytest.mark.processes
def test_processes_whose_first_batches_are_read_differently_compare_by_squares(tmp_path: Path) -> None:
    model, batches = classifier()
    masks = masks_of(model)
    without = [(x,) for x, _ in batches]

    def check(mesh: Any) -> None:
        alike = recalibrate(model, masks, batches, together=True)
        assert alike.divergences == recalibrate(model, masks, batches, "class", together=True).divergences
        mine = without if mesh.get_local_rank() else batches
        different = recalibrate(model, masks, mine, together=True)
        assert different.divergences == recalibrate(model, masks, mine, "", together=True).divergences

    together(check, 2, tmp_path)
