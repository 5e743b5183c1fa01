"""A module that uses all that Lightning offers, small data, and trainers that write where they are told to."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from tests.support.trainers import quiet_trainer


class Everything(LightningModule):
    """Logs, metrics, hyperparameters, all hooks, a scheduler, its own data and configure_model on demand."""

    def __init__(self, width: int = 8, late: bool = False, manual: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = not manual
        self.net: nn.Sequential | None = None
        self.accuracy, self.mean_loss = MulticlassAccuracy(3), MeanMetric()
        self.called: list[str] = []
        self.rate = 0.05
        if not late:
            self._make()

    def _make(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(4, self.hparams.width), nn.BatchNorm1d(self.hparams.width), nn.ReLU(), nn.Dropout(0.1)
            )
            self.net.append(nn.Linear(self.hparams.width, 3))

    def configure_model(self) -> None:
        if self.net is None:
            self._make()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.mean_loss(loss)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("mean_loss", self.mean_loss, on_epoch=True)
        self.log_dict({"steps": float(self.global_step)}, on_step=True)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.5)
        optimizer.step()
        optimizer.zero_grad()
        if self.trainer.is_last_batch:
            self.lr_schedulers().step()
        return None

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def train_dataloader(self) -> DataLoader:
        return data()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = len(self.called)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.called.append(f"loaded {checkpoint['mine'] >= 0}")


def _noting(name: str) -> Callable[..., Any]:
    plain = getattr(LightningModule, name)

    def hook(self: Everything, *args: Any, **kwargs: Any) -> Any:
        self.called.append(name)
        return plain(self, *args, **kwargs)

    hook.__name__ = name
    return hook


NOTED = [
    *("setup teardown prepare_data on_fit_start on_fit_end on_train_start on_train_end on_train_epoch_start").split(),
    *("on_train_epoch_end on_validation_epoch_start on_validation_epoch_end on_validation_start").split(),
    *("on_validation_end on_validation_batch_start on_validation_batch_end on_train_batch_start").split(),
    *("on_before_zero_grad on_before_backward on_after_backward on_before_optimizer_step").split(),
    *("configure_gradient_clipping optimizer_step optimizer_zero_grad backward lr_scheduler_step").split(),
    *("on_before_batch_transfer transfer_batch_to_device on_after_batch_transfer configure_callbacks").split(),
    *("on_validation_model_eval on_validation_model_train on_test_start on_test_end on_predict_start").split(),
    *("on_test_epoch_end on_predict_epoch_end on_predict_batch_end on_test_batch_end on_predict_end").split(),
]
for _name in NOTED:
    setattr(Everything, _name, _noting(_name))


def data(samples: int = 64, seed: int = 1) -> DataLoader:
    inputs = torch.randn(samples, 4, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), 16)


@pytest.fixture
def everything() -> type[Everything]:
    return Everything


@pytest.fixture
def loader() -> Callable[..., DataLoader]:
    return data


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    return partial(quiet_trainer, tmp_path, max_epochs=2)


@pytest.fixture(autouse=True)
def quiet_lightning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        yield
