"""Runs that callbacks make of a module log nothing, whatever it logs in its forward or its target."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from lrp_prune.callbacks import Distillation, RelevanceCollector, RelevancePruning


@pytest.fixture
def make_counting(make_module) -> Any:
    kind = make_module

    class Counting(kind):
        """Logs how often it has run, in evaluation mode and in training."""

        def forward(self, inputs: Tensor) -> Tensor:
            name = "train_runs" if self.training else "runs"
            self.log(name, torch.ones(()), on_step=False, on_epoch=True, reduce_fx="sum")
            return super().forward(inputs)

    return Counting


class Metrics(Callback):
    """What a ModelCheckpoint would see."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_a_target_that_logs_leaves_the_validations_metrics(make_module, make_loader, make_trainer) -> None:
    class Logging(make_module):  # type: ignore[misc,valid-type]
        def relevance_target(self, batch: Any) -> Tensor:
            loss = self.loss(batch)
            self.log_dict({"val_loss": loss + 1, "another": loss})
            return -loss

    values = []
    for callbacks in ([], [RelevanceCollector(max_batches=1)]):
        torch.manual_seed(0)
        trainer = make_trainer(callbacks=callbacks, max_epochs=2)
        trainer.fit(Logging(), make_loader(), make_loader(seed=2))
        values.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert values[0] == values[1] and set(values[0]) == {"val_loss"}


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        ({"method": "lrp"}, []),
        ({"method": "wanda"}, []),
        ({"recalibrate": True, "method": "magnitude"}, []),
        ({"compensation": "exact", "method": "magnitude"}, []),
        ({"method": "magnitude"}, [Distillation()]),
    ],
    ids=["lrp", "wanda", "recalibrated", "compensated", "distilled"],
)
def test_no_run_of_a_round_counts(make_counting, make_loader, make_trainer, arguments, more) -> None:
    metrics = Metrics()
    pruning = RelevancePruning(0.5, rounds=2, reference=make_loader(32, seed=3), summary=False, **arguments)
    trainer = make_trainer(callbacks=[pruning, *more, metrics], max_epochs=3)
    trainer.fit(make_counting(), make_loader(80), make_loader(seed=2))
    assert pruning.round == 2
    assert [seen["runs"] for seen in metrics.seen] == [4, 4, 4]
    assert trainer.callback_metrics["runs"] == 4 and trainer.callback_metrics["train_runs"] == 5


def test_a_hook_of_the_model_that_a_module_without_forward_holds(make_module, make_loader, make_trainer) -> None:
    class Held(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_module().net
            self.net.register_forward_hook(self.noted)

        def noted(self, *_: Any) -> None:
            self.log("runs", torch.ones(()), on_step=False, on_epoch=True, reduce_fx="sum")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        validation_step = training_step
        configure_optimizers = make_module.configure_optimizers
        optimizer_name = "sgd"

    metrics = Metrics()
    trainer = make_trainer(callbacks=[RelevanceCollector(max_batches=1), metrics], max_epochs=1)
    trainer.fit(Held(), make_loader(), make_loader(seed=2))
    assert [seen["runs"] for seen in metrics.seen] == [4]
