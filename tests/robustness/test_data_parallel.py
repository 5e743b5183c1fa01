"""Zeros, gradients and masks in data-parallel trainings, with processes forked, spawned or started from outside."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from lrp_prune.callbacks import RelevancePruning
from tests.robustness.resumable_training import Classifier, Loader, SavedMasks, StatefulLoader
from tests.support.processes import run
from tests.support.trainers import QUIET

pytestmark = pytest.mark.processes

DEFAULTS: dict[str, Any] = {**QUIET, "accelerator": "cpu", "use_distributed_sampler": False}


class Watch(Callback):
    """Pruned weights and their gradients before and after each step, and the norm of what the step used."""

    def __init__(self, pruning: RelevancePruning) -> None:
        self.pruning, self.before, self.norms = pruning, [], []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._check(pl_module)
        self.before.append([parameter.grad.clone() for parameter in pl_module.parameters()])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._check(pl_module)
        self.norms.append(float(torch.cat([parameter.grad.flatten() for parameter in pl_module.parameters()]).norm()))

    def _check(self, pl_module: Any) -> None:
        for name, mask in (self.pruning.masks or {}).items():
            parameter = pl_module.get_parameter(name)
            assert parameter[~mask].count_nonzero() == 0
            assert parameter.grad[~mask].count_nonzero() == 0


@pytest.mark.parametrize("views", [False, True], ids=["copied", "views of buckets"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_pruned_gradients_are_zero_before_they_are_reduced_and_clipped(
    tmp_path: Path, accumulate: int, views: bool
) -> None:
    def train() -> Any:
        pruning = RelevancePruning(sparsity=0.8, scope="global", summary=False)
        watch = Watch(pruning)
        Trainer(
            devices=2,
            strategy=DDPStrategy(gradient_as_bucket_view=views),
            max_epochs=3,
            gradient_clip_val=1e-3,
            accumulate_grad_batches=accumulate,
            callbacks=[pruning, watch],
            **DEFAULTS,
        ).fit(module := Classifier(), StatefulLoader(1), Loader(2))
        assert pruning.masks is not None
        weights = [parameter.detach().clone() for parameter in module.parameters()]
        return pruning.masks.checksum(), watch.before, watch.norms, weights

    one, two = run(train, 2, tmp_path)
    for outcome in (one, two):
        assert isinstance(outcome, tuple), outcome
    assert one[0] == two[0]
    for gradients, others in zip(one[1], two[1], strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients, others, strict=True))
    assert all(norm <= 1e-3 * (1 + 1e-4) for norm in one[2][accumulate - 1 :: accumulate])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one[3], two[3], strict=True))


@pytest.mark.slow
def test_spawned_processes_prune_equally_and_give_the_zeros_back(tmp_path: Path, capfd: Any, monkeypatch: Any) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # which Lightning sets
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    pruning = RelevancePruning(sparsity=0.5, rounds=2, scope="global", summary=False)
    module = Classifier()
    callbacks = [pruning, SavedMasks(tmp_path, pruning)]
    trainer = Trainer(devices=2, strategy="ddp_spawn", max_epochs=3, callbacks=callbacks, **DEFAULTS)
    trainer.fit(module, StatefulLoader(1), Loader(2))
    assert "give back the model's weights only" in capfd.readouterr().err
    first, second = (torch.load(tmp_path / f"masks.{rank}", weights_only=True) for rank in (0, 1))
    assert first == second
    assert first[0] == 2
    zeros = sum(int((parameter == 0).sum()) for parameter in module.parameters() if parameter.dim() == 2)
    assert zeros == (8 * 24 + 24 * 16 + 16 * 4) // 2
