"""Rounds in a training that scale what they keep, before the training goes on."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lrp_prune
from lrp_prune.callbacks import RelevancePruning, _progress
from lrp_prune.pruning import METHODS
from lrp_prune.pruning.recalibration import Recalibration
from tests.support.epoch_states import States, check_as_before


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_a_round_scales_what_it_keeps_as_prune_does(
    reference: bool, corrected: bool, make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    module, loader = make_module(), make_loader(seed=2)
    pruning = RelevancePruning(sparsity=0.6, recalibrate=True, reference=loader if reference else 0)
    before, after = States(), States()
    trained = lrp_prune.CorrectedModule(module) if corrected else module
    make_trainer(callbacks=[before, pruning, after], max_epochs=2).fit(trained, make_loader(), loader)
    dense, pruned = ((state.modules[1].module if corrected else state.modules[1]) for state in (before, after))
    masks = lrp_prune.prune(dense, list(loader), 0.6, rounds=1, recalibrate=True)
    assert pruning.masks == masks
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(pruned.state_dict()[name], value, rtol=1e-6, atol=1e-7)
    assert any((~masks[name]).any() for name in masks)


@pytest.mark.slow
def test_an_average_is_scaled_as_what_it_is_an_average_of(
    make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    """The average of scaled weights is the scaled average; of biases and running statistics, which are shifted, as well."""
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").EMAWeightAveraging
    for optimizer in ("none", "adamw"):
        pruning, before, after = RelevancePruning(sparsity=0.6, recalibrate=True), States(), States()
        callbacks = [before, pruning, after, averaging(decay=0.9)]
        trainer = make_trainer(callbacks=callbacks, max_epochs=2)
        trainer.fit(make_module(optimizer), make_loader(), make_loader(seed=2))
        masks, dense, pruned = pruning.masks, before.modules[1].state_dict(), after.modules[1].state_dict()
        (average,), (made,) = ([entry.state_dict() for entry in state.averages[1]] for state in (before, after))
        assert masks is not None
        for name, mask in masks.items():
            assert not made[name][~mask].any() and not torch.equal(pruned[name][mask], dense[name][mask])
            found, expected = (made[name] * dense[name])[mask], (pruned[name] * average[name])[mask]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        if optimizer == "none":  # an average of equal weights
            for name, _ in after.modules[1].named_parameters():
                torch.testing.assert_close(made[name], pruned[name])
        else:
            assert any(not torch.equal(average[name], dense[name]) for name in masks)


@pytest.mark.slow
def test_off_by_default_and_the_table_says_what_was_done(
    make_module: Any, make_loader: Any, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr("lrp_prune.callbacks._round.show", lambda trainer, text: shown.append(text))
    for recalibrate in (False, True):
        pruning = RelevancePruning(sparsity=0.6, recalibrate=recalibrate)
        module = make_module("none")
        before = copy.deepcopy(module.state_dict())
        make_trainer(callbacks=[pruning], max_epochs=2).fit(module, make_loader(), make_loader(seed=2))
        masks = pruning.masks
        assert masks is not None
        unchanged = all(
            torch.equal(module.state_dict()[name][mask], before[name][mask]) for name, mask in masks.items()
        )
        assert unchanged != recalibrate
    assert ["recalibrated: at strength" in text for text in shown] == [False, True]


@pytest.mark.slow
def test_averages_keep_the_zeros(make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]) -> None:
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").WeightAveraging
    pruning = RelevancePruning(sparsity=0.6, rounds=2, recalibrate=True)
    module = make_module()
    make_trainer(callbacks=[pruning, averaging()], max_epochs=4).fit(module, make_loader(), make_loader(seed=2))
    assert pruning.masks is not None
    assert all(not module.state_dict()[name][~mask].any() for name, mask in pruning.masks.items())


@pytest.mark.parametrize("failing", [1, 2])
def test_an_error_while_it_is_scaled_leaves_weights_and_averages_as_they_were(
    failing: int,
    make_module: Any,
    make_loader: Any,
    make_trainer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that what is written then has the round yet to come."""
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").EMAWeightAveraging
    calls, real = [0], Recalibration.apply_

    def broken(self: Recalibration, model: torch.nn.Module) -> None:
        real(self, model)
        calls[0] += 1
        if calls[0] == failing:
            raise KeyError("not today")

    monkeypatch.setattr(Recalibration, "apply_", broken)
    pruning, before, averages = RelevancePruning(sparsity=0.6, recalibrate=True), States(), averaging(decay=0.5)
    module = make_module()
    trainer = make_trainer(callbacks=[before, pruning, averages], max_epochs=2)
    with pytest.raises(KeyError, match="not today"):
        trainer.fit(module, make_loader(), make_loader(seed=2))
    assert calls[0] == failing and (pruning.round, pruning.masks) == (0, None)
    check_as_before(before, 1, module, averages._average_model.module)


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar, None])
def test_a_progress_bar_beside_the_trainers_own(
    bar: Any, make_module: Any, make_loader: Any, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = _progress.CollectionProgress

    class Noted(real):  # type: ignore[valid-type, misc]
        def __init__(self, trainer: Any, total: float, description: str = "Collecting relevance") -> None:
            super().__init__(trainer, total, description)
            self.shows, self.steps, self.open = (self._tqdm or self._rich) is not None, [0.0, total], True
            if description == "Recalibrating":
                made.append(self)

        def advance(self, batches: int = 1) -> None:
            super().advance(batches)
            self.steps[0] += batches

        def close(self) -> None:
            super().close()
            self.open = False

    monkeypatch.setattr(_progress, "CollectionProgress", Noted)
    pruning = RelevancePruning(sparsity=0.6, recalibrate=True, summary=False)
    callbacks = [pruning, *([bar()] if bar is not None else [])]
    trainer = make_trainer(callbacks=callbacks, enable_progress_bar=bar is not None, max_epochs=2)
    trainer.fit(make_module("none"), make_loader(), make_loader(seed=2))
    (shown,) = made
    assert shown.shows == (bar is not None) and not shown.open
    assert shown.steps[0] == shown.steps[1] > 0


class Reseed(Callback):
    """Lightning does not store the random state."""

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(trainer.global_step)


@pytest.mark.slow
def test_resumed_with_masks_that_wait_it_is_the_uninterrupted_training(
    make_module: Any,
    make_loader: Any,
    make_trainer: Callable[..., Any],
    same_weights: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[str] = []
    monkeypatch.setattr("lrp_prune.callbacks._round.show", lambda trainer, text: shown.append(text))

    def arguments(pruning: RelevancePruning) -> dict[str, Any]:
        checkpoint = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
        return {"callbacks": [pruning, checkpoint, Reseed()], "max_epochs": 3, "enable_checkpointing": True}

    def pruned() -> RelevancePruning:
        return RelevancePruning(sparsity=0.6, recalibrate=True, method=lrp_prune.LRP(target="multi_label"))

    def multi_label() -> DataLoader[Any]:
        inputs, labels = make_loader(seed=2).dataset.tensors
        return DataLoader(TensorDataset(inputs, torch.nn.functional.one_hot(labels, 4).float()), 16)

    whole, module = make_module(), make_module(seed=9)
    make_trainer(**arguments(pruned())).fit(whole, make_loader(), multi_label())
    (table,) = shown
    resumed = pruned()
    make_trainer(**arguments(resumed)).fit(module, make_loader(), multi_label(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same_weights(whole, module)
    assert shown == [table, table] and "explains: the logits of labels that are set" in table
    state = resumed.state_dict()
    assert state.pop("pending_target") == ""
    resumed.load_state_dict(state)  # of an earlier version


@pytest.mark.slow
def test_all_methods_recalibrate_one_mask_alike(
    make_module: Any, make_loader: Any, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, shown = make_module("none"), list[str]()
    masks = lrp_prune.select(lrp_prune.pruning.scorer("random", module).compute(), 0.6, scope="layer")
    monkeypatch.setattr("lrp_prune.callbacks._pruner.select", lambda *_, **__: masks)
    monkeypatch.setattr("lrp_prune.callbacks._round.show", lambda trainer, text: shown.append(text))
    for method in METHODS:
        pruning = RelevancePruning(sparsity=0.6, recalibrate=True, method=method)
        trainer = make_trainer(callbacks=[pruning, Reseed()], max_epochs=2)
        trainer.fit(copy.deepcopy(module), make_loader(), make_loader(seed=2))
    told = {line for text in shown for line in text.splitlines() if line.startswith("recalibrated")}
    assert len(shown) == len(METHODS) and len(told) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_without_batches_to_recalibrate_on_no_step_is_made(
    method: str, make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    def fit(loader: Any, pruning: RelevancePruning, **options: Any) -> int:
        module = make_module()
        try:
            make_trainer(callbacks=[pruning], max_epochs=2, **options).fit(module, make_loader(), loader)
        finally:
            steps = len(module.zeros_after_step)
            assert steps in (0, 8)
        return steps

    def pruning(**arguments: Any) -> RelevancePruning:
        return RelevancePruning(method=method, **{"recalibrate": True, **arguments})

    needed = "recalibrate=True needs batches: a validation loader .* or reference="
    with pytest.raises(MisconfigurationException, match=needed):
        fit(None, pruning())
    with pytest.raises(MisconfigurationException, match=needed):
        fit(make_loader(seed=2), pruning(), limit_val_batches=0)
    with pytest.raises(MisconfigurationException, match="reference=3, but there is one validation loader"):
        fit(make_loader(seed=2), pruning(reference=3))
    assert fit(None, pruning(reference=make_loader(seed=2))) == fit(None, pruning(preview=True)) == 8
    assert fit(make_loader(seed=2), pruning()) == fit(None, pruning(recalibrate=False)) == 8


@pytest.mark.slow
@pytest.mark.parametrize("reference", [False, True])
def test_no_more_batches_are_read_and_moved_than_are_looked_at(
    reference: bool, make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    class States(Callback):
        def __init__(self) -> None:
            self.states: list[torch.Tensor] = []

        def on_train_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                self.states.append(torch.get_rng_state())
                moved.clear()
                read.clear()

        def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == 0:
                counts.append((len(moved), len(read)))

    moved, read, counts = [], [], list[tuple[int, int]]()
    data = make_loader(samples=640, seed=2).dataset

    class Read(Dataset[Any]):
        def __len__(self) -> int:
            return 640

        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return data[index]

    loader = DataLoader(Read(), 20, shuffle=True)
    module = make_module()
    module.on_before_batch_transfer = lambda batch, dataloader_idx: (moved.append(1), batch)[1]
    pruning = RelevancePruning(method="magnitude", recalibrate=True, reference=loader if reference else 0)
    before, after = States(), States()
    trainer = make_trainer(
        callbacks=[before, pruning, after], max_epochs=2, limit_val_batches=1.0, num_sanity_val_steps=0
    )
    after.on_train_epoch_start = lambda trainer, pl_module: after.states.append(torch.get_rng_state())  # type: ignore[method-assign]
    trainer.fit(module, make_loader(), None if reference else loader)
    assert pruning.round == 1
    assert torch.equal(before.states[0], after.states[-1])
    assert counts[0] == (16 + 1, 16 * 20)  # and the training's own first batch


def test_outputs_that_cannot_be_compared_are_refused_with_the_way_out(
    make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    class Chosen(type(make_module())):  # type: ignore[misc]
        """Says nothing of some samples."""

        def forward(self, batch: Any) -> torch.Tensor:
            logits = self.net(batch[0])
            return logits[logits[:, 0] > logits[:, 0].mean()]

        def loss(self, batch: Any) -> torch.Tensor:
            return self(batch).square().mean()

    module, pruning = Chosen("none"), RelevancePruning(0.6, method="wanda", recalibrate=True)
    with pytest.raises(ValueError, match=r"nothing that the dense model gives .* pass recalibrate=False"):
        make_trainer(callbacks=[pruning], max_epochs=2).fit(module, make_loader(), make_loader(256, 64, seed=2))
    assert module.zeros_after_step == [0] * 4
