"""The metric that is to be monitored is the one of the pruned model, wherever the module logs it."""

import warnings
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lrp_prune.callbacks import RelevancePruning, RoundQuality, Rounds
from tests.callbacks.conftest import Classifier


class AtItsEnd(Classifier):
    """Logs the loss where a validation ends, as metrics are that need all of its batches."""

    def on_validation_epoch_start(self) -> None:
        self.losses: list[torch.Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.losses.append(self.loss(batch))

    def on_validation_epoch_end(self) -> None:
        self.log("val_loss", torch.stack(self.losses).mean())


class Seen(Callback):
    """What is there for callbacks that monitor it."""

    def __init__(self) -> None:
        self.values: list[tuple[float, float]] = []

    def _look(self, trainer: Any) -> None:
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            self.values.append((float(metrics["pruning/val_loss"]), float(metrics["val_loss"])))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._look(trainer)


class SeenAtEpochs(Seen):
    """In the end of training epochs."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None: ...

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch:
            self._look(trainer)


OFTEN: dict[str, Any] = {"max_epochs": 6, "check_val_every_n_epoch": 2}


@pytest.mark.parametrize("make", [Classifier, AtItsEnd])
def test_the_pruned_model_has_its_own_value(make: Any, make_loader, make_trainer, same_weights, tmp_path) -> None:
    pruning = RelevancePruning(0.95, Rounds(1, start=2), monitor="val_loss", summary=False)
    best, seen, epochs = ModelCheckpoint(tmp_path, monitor="pruning/val_loss"), Seen(), SeenAtEpochs()
    trainer = make_trainer(callbacks=[pruning, seen, epochs, best], enable_checkpointing=True, **OFTEN)
    trainer.fit(make(), make_loader(), make_loader(seed=2))
    assert [monitored > 1e30 for monitored, _ in seen.values] == [True, False, False]
    assert all(monitored == value for monitored, value in seen.values[1:])
    # Nothing is known of the pruned model before its first validation, after epoch 3.
    assert [monitored > 1e30 for monitored, _ in epochs.values] == [True, True, False, False, False]
    twin = make()
    twin.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    (measured,) = make_trainer().validate(twin, make_loader(seed=2), verbose=False)
    assert measured["val_loss"] == pytest.approx(float(best.best_model_score), abs=1e-6)


@pytest.mark.parametrize(("make", "first", "told"), [(AtItsEnd, True, 1), (AtItsEnd, False, 0), (Classifier, True, 0)])
def test_who_looks_too_early_is_told_by_name(make: Any, first: bool, told: int, make_loader, make_trainer) -> None:
    callbacks = [
        EarlyStopping("pruning/val_loss", patience=9),
        RelevancePruning(0.5, 1, monitor="val_loss", summary=False),
    ]
    trainer = make_trainer(callbacks=callbacks if first else callbacks[::-1], max_epochs=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(make(), make_loader(), make_loader(seed=2))
    late = [str(entry.message) for entry in caught if "one validation late" in str(entry.message)]
    assert len(late) == told
    assert all("EarlyStopping(monitor='pruning/val_loss')" in text for text in late)


def test_a_rounds_quality_is_none_of_the_model_before(make_loader, make_trainer) -> None:
    pruning = RelevancePruning(0.5, Rounds(2, start=2, every_n_epochs=2), monitor="val_loss", summary=False)
    quality, seen = RoundQuality(summary=False), Seen()
    make_trainer(callbacks=[pruning, quality, seen], **OFTEN).fit(AtItsEnd(), make_loader(), make_loader(seed=2))
    assert [point.value for point in quality.points] == [value for _, value in seen.values]


@pytest.mark.parametrize("make", [ModelCheckpoint, EarlyStopping])
def test_opposite_modes_are_refused(make: Any, make_module, make_loader, make_trainer) -> None:
    def trainer(**arguments: Any) -> Any:
        callbacks = [RelevancePruning(0.8, 1, monitor="acc", **arguments), make(monitor="pruning/acc", mode="max")]
        return make_trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=2)

    module = make_module()
    match = rf"{make.__name__}\(monitor='pruning/acc', mode='max'\) and .*monitor_mode='min'\) do not agree"
    with pytest.raises(MisconfigurationException, match=match):
        trainer().fit(module, make_loader(), make_loader())
    assert not module.zeros_after_step
    module.validation_step = lambda batch, batch_idx: module.log("acc", 0.5)
    trainer(monitor_mode="max").fit(module, make_loader(), make_loader())


def test_a_metric_of_one_of_several_loaders(make_module, make_loader, make_trainer, tmp_path) -> None:
    name = "val_loss/dataloader_idx_1"
    pruning, quality = RelevancePruning(0.9, 1, monitor=name, summary=False), RoundQuality(name, summary=False)
    best = ModelCheckpoint(tmp_path, monitor=f"pruning/{name}")
    trainer = make_trainer(callbacks=[pruning, quality, best], enable_checkpointing=True, max_epochs=3)
    module = make_module()
    trainer.fit(module, make_loader(), [make_loader(seed=2), make_loader(seed=3)])
    assert trainer.callback_metrics[f"pruning/{name}"] == trainer.callback_metrics[name]
    twin = make_module()
    twin.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    (measured,) = make_trainer().validate(twin, make_loader(seed=3), verbose=False)
    assert measured["val_loss"] == pytest.approx(float(best.best_model_score), abs=1e-6)


@pytest.mark.parametrize("guards", [True, False])
def test_a_bare_trainer_logs_nothing_to_follow(guards: bool, make_module, make_loader) -> None:
    callbacks = [RelevancePruning(0.5, 1, monitor=None if guards else "val_loss", summary=False)]
    callbacks += [RoundQuality("val_loss", limit=0.7)] if guards else []
    trainer = Trainer(callbacks=callbacks, barebones=True, max_epochs=2, accelerator="cpu")
    module = make_module()
    name = "RoundQuality" if guards else "RelevancePruning"
    with pytest.raises(MisconfigurationException, match=rf"{name}\(monitor='val_loss'\).*barebones=True"):
        trainer.fit(module, make_loader(), make_loader(seed=2))
    assert not module.zeros_after_step
