"""Learning rates begin anew after each round, whatever scheduler there is, also where a training is resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lrp_prune.callbacks import LearningRateRewinding, RelevancePruning, Rounds
from tests.support.resumed import check_resumed_equals_whole


class Rates(Callback):
    """The learning rate (and momentum) of each batch."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.momenta: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        group = trainer.optimizers[0].param_groups[0]
        self.momenta.append(group.get("momentum", 0.0))

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        torch.manual_seed(trainer.global_step)
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        if not self.rates or trainer.is_last_batch is None or len(self.rates[-1]) == trainer.num_training_batches:
            self.rates.append([])
        self.rates[-1].append(rate)


def configured(make: Callable[[Any], Any], interval: str) -> Callable[[Any], Any]:
    def configure(module: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": interval}}

    return configure


SCHEDULES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "by steps": (lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "step"),
    "by epochs": (lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "epoch"),
    "two after each other": (
        lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
                torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
            ],
            [3],
        ),
        "step",
    ),
    "momentum as well": (
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=1000),
        "step",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_round_has_the_schedule_from_its_beginning(make_module, make_loader, make_trainer, schedule: str) -> None:
    module = make_module(optimizer=configured(*SCHEDULES[schedule]))
    pruning, rates = RelevancePruning(0.7, Rounds(2, every_n_epochs=2)), Rates()
    trainer = make_trainer(callbacks=[pruning, LearningRateRewinding(), rates], max_epochs=5)
    trainer.fit(module, make_loader(), make_loader(seed=2))
    before, first, beside, second, last = rates.rates
    assert len(set(before)) > 1 or len(set(first + beside)) > 1
    assert first == before and second == first and last == beside  # rounds at the start of epochs 1 and 3
    assert beside != first
    momenta = [rates.momenta[len(before) * epoch : len(before) * (epoch + 1)] for epoch in range(5)]
    assert momenta[1] == momenta[0] == momenta[3]


def test_without_it_they_go_on_falling(make_module, make_loader, make_trainer) -> None:
    rates = Rates()
    module = make_module(optimizer=configured(*SCHEDULES["by steps"]))
    trainer = make_trainer(callbacks=[RelevancePruning(0.7, 1), rates], max_epochs=2)
    trainer.fit(module, make_loader(), make_loader(seed=2))
    assert rates.rates[1][0] < rates.rates[0][-1]


@pytest.mark.slow
def test_a_resumed_training_equals_the_uninterrupted_one(
    make_module, make_loader, make_trainer, same_weights, tmp_path: Path
) -> None:
    def callbacks() -> list[Any]:
        return [RelevancePruning(0.7, Rounds(2, every_n_epochs=2)), LearningRateRewinding(), Rates()]

    def module() -> Any:
        return make_module(optimizer=configured(*SCHEDULES["by steps"]))

    def loaders() -> Any:
        return make_loader(), make_loader(seed=2)

    check_resumed_equals_whole(make_trainer, module, callbacks, loaders, same_weights, tmp_path / "c")


@pytest.mark.slow
def test_a_training_that_began_without_it_is_told_what_it_rewinds_to(
    make_module, make_loader, make_trainer, tmp_path: Path
) -> None:
    def fit(epochs: int, further: list[Any], path: Path | None = None, optimizer: Any = None) -> Rates:
        rates = Rates()
        pruning = RelevancePruning(0.7, Rounds(2, every_n_epochs=2, start=2))
        checkpoint = ModelCheckpoint(dirpath=tmp_path / "c", save_top_k=-1, filename="{epoch}")
        module = make_module(optimizer=optimizer or configured(*SCHEDULES["by epochs"]))
        made = make_trainer(
            callbacks=[pruning, *further, checkpoint, rates], max_epochs=epochs, enable_checkpointing=True
        )
        made.fit(module, make_loader(), make_loader(seed=2), ckpt_path=path)
        return rates

    fit(5, [])
    with pytest.warns(UserWarning, match="no state of LearningRateRewinding.*those of step 4"):
        rates = fit(5, [LearningRateRewinding()], tmp_path / "c" / "epoch=0.ckpt")
    resumed, first, beside, second = rates.rates
    assert first == second == resumed and beside != first and resumed[0] == 0.05
    with pytest.raises(MisconfigurationException, match="with 1 schedulers, and this one has 0"):
        fit(6, [LearningRateRewinding()], tmp_path / "c" / "epoch=1-v1.ckpt", "sgd")


class Counting(torch.optim.SGD):
    """Keeps an estimate of its own in its groups."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
        return super().step(closure)


def test_what_no_scheduler_sets_stays(make_module, make_loader, make_trainer) -> None:
    """An optimizer's own counts, and an optimizer without a scheduler."""

    class Two(type(make_module())):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
            self.optimizers()[1].param_groups[0]["lr"] *= 0.9
            self.lr_schedulers().step()

        def configure_optimizers(self) -> Any:
            first, *others = self.parameters()
            scheduled = Counting([first], lr=0.1)
            scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 0.9**step)
            return [scheduled, torch.optim.SGD(others, lr=0.2)], [scheduler]

    rates: list[tuple[float, float]] = []

    class Noting(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            rates.append(tuple(optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers))

    trainer = make_trainer(callbacks=[RelevancePruning(0.5), LearningRateRewinding(), Noting()], max_epochs=2)
    trainer.fit(Two(), make_loader(), make_loader(seed=2))
    assert trainer.optimizers[0].param_groups[0]["steps"] == len(rates) == 8
    assert [scheduled for scheduled, _ in rates] == pytest.approx([0.1 * 0.9**step for step in (*range(4), *range(4))])
    assert [other for _, other in rates] == pytest.approx([0.2 * 0.9**step for step in range(8)])


def test_a_plateau_is_forgotten(make_module, make_loader, make_trainer) -> None:
    """What was best before a round is not what it is measured by after it."""
    schedulers: list[Any] = []

    def configure(module: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        schedulers.append(
            torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=100, threshold_mode="abs")
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedulers[0], "monitor": "val_loss"}}

    rates = Rates()
    pruning = RelevancePruning(0.5, Rounds(1, start=3))
    trainer = make_trainer(callbacks=[pruning, LearningRateRewinding(), rates], max_epochs=5)
    trainer.fit(make_module(optimizer=configure), make_loader(), make_loader(seed=2))
    assert [epoch[0] for epoch in rates.rates] == pytest.approx([0.1, 0.1, 0.01, 0.1, 0.1])


def test_it_stands_after_each_pruning(make_module, make_loader, make_trainer) -> None:
    one, other = RelevancePruning(0.5, include=["net.0"]), RelevancePruning(0.5, include=["net.2"], name="other")
    for callbacks, message in (
        ([LearningRateRewinding()], "none before it"),
        ([LearningRateRewinding(), one], "one after it"),
        ([one, LearningRateRewinding(), other], "one after it"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            make_trainer(callbacks=callbacks, max_epochs=2).fit(make_module(), make_loader(), make_loader(seed=2))


def test_a_training_without_a_scheduler_is_told(make_module, make_loader, make_trainer) -> None:
    callbacks = [RelevancePruning(0.5), LearningRateRewinding()]
    with pytest.warns(UserWarning, match="nothing to rewind"):
        make_trainer(callbacks=callbacks, max_epochs=2).fit(make_module(), make_loader(), make_loader(seed=2))


def test_further_groups_of_parameters_are_refused(make_module, make_loader, make_trainer) -> None:
    class Adding(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.optimizers[0].add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1})

    callbacks = [RelevancePruning(0.5), LearningRateRewinding(), Adding()]
    module = make_module(
        optimizer=configured(lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer), "epoch")
    )
    with pytest.raises(MisconfigurationException, match="2 groups of parameters and had 1"):
        make_trainer(callbacks=callbacks, max_epochs=2).fit(module, make_loader(), make_loader(seed=2))
