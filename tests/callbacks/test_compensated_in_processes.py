"""Trainings of several processes: one compensation of all their batches, or a refusal before anything is pruned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from lrp_prune.callbacks import RelevancePruning
from lrp_prune.pruning import LeastSquares
from tests.robustness.resumable_training import Classifier
from tests.support.sharding import results
from tests.support.still import Uneven, loader
from tests.support.trainers import sharded_trainer as trainer

pytestmark = pytest.mark.processes


class Seen(Callback):
    """Weights when the round has pruned."""

    def __init__(self, pruning: RelevancePruning) -> None:
        self.pruning, self.found = pruning, dict[str, torch.Tensor]()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.pruning.round == 1 and not self.found:
            self.found = {name: value.detach().clone() for name, value in pl_module.named_parameters()}


@pytest.mark.parametrize("data", ["validation", "reference", "uneven"])
def test_two_processes_come_to_what_one_comes_to(tmp_path: Path, data: str) -> None:
    """Of validations whose batches are divided among them, of reference data that each has, and of some more batches in one."""
    way = LeastSquares(steps=500, tolerance=1e-9)
    # Nothing depends on what relevance is collected on.
    given = {"method": "magnitude", "reference": loader(64, 5) if data == "reference" else 0}

    def call(processes: int) -> Any:
        pruning = RelevancePruning(0.6, compensation=way, summary=False, **given)
        seen = Seen(pruning)
        arguments: dict[str, Any] = {"max_epochs": 2, "callbacks": [pruning, seen]}
        if processes > 1:
            arguments["strategy"] = "ddp"
        samples, own = 64, Uneven()
        if data == "uneven":
            arguments["use_distributed_sampler"] = False
        made = trainer(processes, tmp_path, **arguments)
        validation = loader(samples, 2)
        if data == "uneven" and processes > 1:
            part = torch.utils.data.Subset(validation.dataset, range(40) if made.global_rank else range(40, 64))
            validation = DataLoader(part, 4)
        made.fit(own, loader(48, 1), validation)
        return seen.found

    (expected,) = results(lambda: call(1), 1, tmp_path / "one")
    theirs = results(lambda: call(2), 2, tmp_path / "two")
    for found in theirs:
        for name, value in expected.items():
            assert torch.equal(found[name], theirs[0][name])
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
    dense = dict(Uneven().named_parameters())
    kept = expected["net.2.weight"] != 0
    assert not torch.equal(expected["net.2.weight"][kept], dense["net.2.weight"][kept])


def test_a_strategy_that_divides_weights_is_refused_in_setup(tmp_path: Path) -> None:
    """By name, with what to do; a preview changes no weight."""

    def call() -> None:
        given = {"summary": False, "method": "magnitude", "reference": loader(16, 5)}
        pruning = RelevancePruning(0.6, compensation="exact", **given)
        made = trainer(2, tmp_path, max_epochs=2, callbacks=[pruning])
        message = "ModelParallelStrategy divides them: use strategy='ddp', or recalibrate=True"
        with pytest.raises(MisconfigurationException, match=message):
            made.fit(Classifier(), loader(48, 1), loader(16, 2))
        assert pruning.round == 0 and made.global_step == 0
        previewing = RelevancePruning(0.6, compensation="exact", preview=True, **given)
        trainer(2, tmp_path, max_epochs=2, callbacks=[previewing]).fit(Classifier(), loader(48, 1), loader(16, 2))
        assert previewing.previewed is not None

    results(call, 2, tmp_path)
