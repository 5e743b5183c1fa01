"""What a row of a weight is, is known from its module before anything has run, as methods that look at no data know it."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lrp_prune.callbacks import RelevancePruning


class Upsampling(LightningModule):
    """Has weights whose inputs come first, and kernels that no pattern fits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.ConvTranspose1d(8, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))

    def training_step(self, batch: Tensor, batch_idx: int) -> STEP_OUTPUT:
        return self.layers(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_patterns_fit_transposed_convolutions_from_the_start(method: str) -> None:
    torch.manual_seed(0)
    module, loader = Upsampling(), DataLoader(torch.randn(8, 8, 4), batch_size=4)
    pruning = RelevancePruning(0.5, 1, method=method, scope="2:4", include=["0.weight"], summary=False)
    Trainer(
        max_epochs=2, callbacks=[pruning], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, loader, loader)  # fmt: skip
    kept = pruning.masks["0.weight"]
    assert bool((kept.unflatten(0, (2, 4)).sum(1) == 2).all())
