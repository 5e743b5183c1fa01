"""Budgets in steps of N:M with every method, in one shot and in the rounds of a training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lrp_prune
from lrp_prune.callbacks import RelevancePruning
from lrp_prune.pruning import METHODS
from lrp_prune.pruning.budgets import Budget
from tests.support.trainers import quiet_trainer

SHARES = {"net.0.weight": 0.25, "net.2.weight": 0.75, "net.4.weight": 0.5}


class Module(LightningModule):
    """An MLP whose layers have multiples of eight inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def data() -> DataLoader[Any]:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), 16)


def budget(model: nn.Module) -> Budget:
    return Budget(SHARES, {name: model.get_parameter(name).numel() for name in SHARES})


def check_patterns(masks: lrp_prune.Masks, shares: dict[str, float]) -> None:
    for name, share in shares.items():
        assert (~masks[name]).reshape(-1, 8).sum(1).eq(round(8 * share)).all(), name


@pytest.mark.parametrize("compensation", [None, "exact"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_each_tensor_by_its_own_pattern(method: str, compensation: str | None) -> None:
    model = Module()
    shares = budget(model)
    given: dict[str, Any] = {"compensation": compensation, "scope": "N:8", "progress": False}
    masks = lrp_prune.prune(model, list(data()), shares.in_steps(8), method, **given)
    check_patterns(masks, SHARES)
    assert masks.sparsity == pytest.approx(shares.sparsity)
    for name in SHARES:
        assert not model.get_parameter(name)[~masks[name]].any()


@pytest.mark.parametrize("method", METHODS)
def test_a_training_prunes_by_a_budget(tmp_path: Path, method: str) -> None:
    """In rounds each tensor has its share of its own, and in the end what was given."""
    module = Module()
    pruning = RelevancePruning(budget(module), rounds=2, schedule="linear", scope="layer", method=method, summary=False)
    quiet_trainer(tmp_path, max_epochs=4, callbacks=[pruning]).fit(module, data(), data())
    assert {name: pruning.masks.sparsity_of(name) for name in SHARES} == pytest.approx(SHARES)
    assert pruning.masks.sparsity == pytest.approx(budget(module).sparsity)


def test_a_training_prunes_by_mixed_patterns(tmp_path: Path) -> None:
    module = Module()
    pruning = RelevancePruning(budget(module).in_steps(8), scope="N:8", compensation="exact", summary=False)
    quiet_trainer(tmp_path, max_epochs=2, callbacks=[pruning]).fit(module, data(), data())
    check_patterns(pruning.masks, SHARES)
    for name in SHARES:
        assert not module.get_parameter(name)[~pruning.masks[name]].any()
