"""Small real trainings: a classifier on made-up data, and a trainer that writes only where it is told to."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.support.trainers import quiet_trainer


class Classifier(LightningModule):
    """An MLP with dropout and batch normalization, so that modes, buffers and random numbers matter."""

    def __init__(self, optimizer: str | Callable[[Any], Any] = "adamw", seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(8, 24),
                nn.BatchNorm1d(24),
                nn.ReLU(),
                nn.Dropout(0.2),
                nn.Linear(24, 16),
                nn.ReLU(),
                nn.Linear(16, 4),
            )
        self.optimizer_name = optimizer
        self.zeros_after_step: list[int] = []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.zeros_after_step.append(zeros_in(self))

    def configure_optimizers(self) -> Any:
        if callable(self.optimizer_name):
            return self.optimizer_name(self)
        if self.optimizer_name == "none":
            return torch.optim.SGD(self.parameters(), lr=0.0)
        if self.optimizer_name == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class ManualClassifier(Classifier):
    """Two optimizers in manual optimization; the second is stepped every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        self.manual_backward(self.loss(batch))
        self.clip_gradients(first, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        self.manual_backward(self.loss(batch))
        if batch_idx % 2:
            second.step()
            second.zero_grad()
            first.zero_grad()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.net[0].parameters(), lr=0.02),
            torch.optim.SGD([*self.net[4].parameters(), *self.net[6].parameters()], lr=0.05, momentum=0.9),
        ]


def zeros_in(module: nn.Module) -> int:
    """Zeros in the weight matrices."""
    return sum(int((parameter == 0).sum()) for parameter in module.parameters() if parameter.dim() == 2)


@pytest.fixture
def make_module() -> Callable[..., Classifier]:
    return Classifier


@pytest.fixture
def make_manual_module() -> Callable[..., Classifier]:
    return ManualClassifier


@pytest.fixture
def count_zeros() -> Callable[[nn.Module], int]:
    return zeros_in


@pytest.fixture
def make_loader() -> Callable[..., DataLoader]:
    def make(samples: int = 64, batch_size: int = 16, seed: int = 1) -> DataLoader:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(samples, 8, generator=generator)
        labels = (inputs[:, :4] + 0.5 * inputs[:, 4:]).argmax(dim=1)
        return DataLoader(TensorDataset(inputs, labels), batch_size)

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    return partial(quiet_trainer, tmp_path)


@pytest.fixture(autouse=True)
def quiet_lightning() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        yield


@pytest.fixture
def same_weights() -> Callable[[nn.Module, nn.Module], bool]:
    def same(first: nn.Module, second: nn.Module) -> bool:
        pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    return same
