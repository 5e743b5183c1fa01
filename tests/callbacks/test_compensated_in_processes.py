"""Trainings of several processes, with a whole model each or parts of one: one compensation of all their batches."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from lrp_prune.callbacks import RelevancePruning
from lrp_prune.callbacks._strategies import check_compensated_strategy
from lrp_prune.pruning import LeastSquares
from tests.support.sharding import results, whole
from tests.support.still import Uneven, loader
from tests.support.trainers import sharded_trainer as trainer

pytestmark = pytest.mark.processes


class Seen(Callback):
    """Weights when the round has pruned."""

    def __init__(self, pruning: RelevancePruning) -> None:
        self.pruning, self.found = pruning, dict[str, torch.Tensor]()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.pruning.round == 1 and not self.found:
            self.found = {name: whole(value).clone() for name, value in pl_module.named_parameters()}


@pytest.mark.parametrize(
    ("data", "strategy"),
    [("validation", "ddp"), ("reference", "ddp"), ("uneven", "ddp"), ("validation", "fsdp"), ("reference", "fsdp")],
)
def test_two_processes_come_to_what_one_comes_to(tmp_path: Path, data: str, strategy: str) -> None:
    """Of validations whose batches are divided among them, of reference data that each has, and of some more batches in one."""
    way = LeastSquares(damping=0.01, steps=500, tolerance=1e-9)
    # Nothing depends on what relevance is collected on.
    given = {"method": "magnitude", "reference": loader(64, 5) if data == "reference" else 0}

    def call(processes: int) -> Any:
        pruning = RelevancePruning(0.6, compensation=way, summary=False, **given)
        seen = Seen(pruning)
        arguments: dict[str, Any] = {"max_epochs": 2, "callbacks": [pruning, seen]}
        if processes > 1 and strategy == "ddp":
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


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_a_strategy_that_has_no_whole_layer_is_refused_in_setup(strategy: Any) -> None:
    """By name, with what to do, also where it was allowed as untested; a preview changes no weight."""
    trainer: Any = SimpleNamespace(strategy=object.__new__(strategy))
    message = (
        f"compensation works on whole layers, and {strategy.__name__} has none: use strategy='ddp', or ModelParallel"
    )
    with pytest.raises(MisconfigurationException, match=message):
        check_compensated_strategy(trainer)
    for processes in (DDPStrategy, ModelParallelStrategy):
        check_compensated_strategy(SimpleNamespace(strategy=object.__new__(processes)))  # type: ignore[arg-type]


def test_a_preview_on_divided_weights_changes_none(tmp_path: Path) -> None:
    def call() -> None:
        given = {"summary": False, "method": "magnitude", "reference": loader(16, 5)}
        previewing = RelevancePruning(0.6, compensation="exact", preview=True, **given)
        own = Uneven()
        trainer(2, tmp_path, max_epochs=2, callbacks=[previewing]).fit(own, loader(48, 1), loader(16, 2))
        assert previewing.previewed is not None and previewing.round == 0
        for value, other in zip(own.parameters(), Uneven().parameters(), strict=True):
            assert torch.equal(whole(value), other)

    results(call, 2, tmp_path)
