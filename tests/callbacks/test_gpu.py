"""Trainings on a GPU, where there is one: alone, and by the strategies with nccl on one card."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.support.on_gpu import needs_a_gpu, on_a_gpu
from tests.support.trainers import QUIET

pytestmark = [pytest.mark.processes, needs_a_gpu]


class Classifier(nn.Module):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3),
                                  nn.ReLU(), nn.Flatten(), nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 4))  # fmt: skip
        self.body(torch.zeros(2, 1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def training(**options: Any) -> Any:
    """A LightningModule, its loaders, and a trainer on one card."""
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = Classifier()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, (x.mean((1, 2, 3)) * 8).long().clamp(0, 3))
    defaults = {**QUIET, "accelerator": "gpu", "devices": 1, "max_epochs": 4}
    return Module(), DataLoader(data, 16), DataLoader(data, 16), Trainer(**{**defaults, **options})


def strategy(name: str) -> Any:
    """A strategy of Lightning on one card."""
    if name != "fsdp2":
        return name
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", ["auto", "ddp", "fsdp2"])
def test_a_training_on_a_card_is_pruned_and_keeps_its_zeros(name: str, precision: str, tmp_path: Path) -> None:
    if name == "fsdp2" and precision == "16-mixed":
        pytest.skip("Lightning's ModelParallelStrategy has no 16-mixed")

    def train() -> tuple[float, int, bool, str | None]:
        from lrp_prune.callbacks import RelevancePruning

        pruning = RelevancePruning(sparsity=0.7, rounds=2, summary=False, recalibrate=True)
        module, train_loader, val_loader, trainer = training(
            callbacks=[pruning], strategy=strategy(name), precision=precision, default_root_dir=tmp_path
        )
        if name == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            def configure_model() -> None:
                if not hasattr(module.model, "set_requires_gradient_sync"):
                    fully_shard(module.model, mesh=module.device_mesh["data_parallel"])

            module.configure_model = configure_model
        trainer.fit(module, train_loader, val_loader)
        wrong = 0
        for key in pruning.masks:
            weight = module.get_parameter(key)
            local = weight.to_local() if hasattr(weight, "to_local") else weight
            wrong += int(local.detach().cpu()[~pruning.masks.local(key).cpu()].count_nonzero())
        backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else None
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())
        return pruning.masks.sparsity, wrong, finite, backend

    sparsity, wrong, finite, backend = on_a_gpu(train, tmp_path)
    assert abs(sparsity - 0.7) < 1e-3
    assert (wrong, finite) == (0, True)
    assert backend == (None if name == "auto" else "nccl")


def test_a_training_on_a_card_resumes_with_its_masks(tmp_path: Path) -> None:
    def train() -> list[tuple[int, dict[str, Tensor]]]:
        from lightning.pytorch.callbacks import ModelCheckpoint

        from lrp_prune.callbacks import RelevancePruning

        found = []
        for half in (None, tmp_path / "epoch=1.ckpt"):
            pruning = RelevancePruning(sparsity=0.6, rounds=2, summary=False)
            saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
            module, train_loader, val_loader, trainer = training(
                callbacks=[pruning, saving], enable_checkpointing=True, default_root_dir=tmp_path
            )
            trainer.fit(module, train_loader, val_loader, ckpt_path=half, weights_only=False)
            found.append((pruning.round, {name: pruning.masks[name].cpu() for name in pruning.masks}))
        return found

    whole, resumed = on_a_gpu(train, tmp_path)
    assert whole[0] == resumed[0] == 2
    weights = sum(mask.numel() for mask in whole[1].values())
    # Loaders that shuffle by an RNG that is not stored would part them; these do not, and a card's sums round as they like.
    assert sum(int((mask != resumed[1][name]).sum()) for name, mask in whole[1].items()) < 0.02 * weights
