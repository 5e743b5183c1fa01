"""Rounds in a training that update what they keep, before the training goes on."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

import lrp_prune
from lrp_prune.callbacks import RelevancePruning
from lrp_prune.pruning import LeastSquares, OptimalBrainSurgeon
from lrp_prune.pruning.compensation import Compensated, compensate_
from tests.support.epoch_states import States, check_as_before

EXACT = LeastSquares(steps=500, tolerance=1e-9)


def inside(module: Any) -> Any:
    return module.module if isinstance(module, lrp_prune.CorrectedModule) else module


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_a_round_updates_what_it_keeps_as_prune_does(
    reference: bool, corrected: bool, make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    module, loader = make_module(), make_loader(seed=2)
    pruning = RelevancePruning(sparsity=0.6, compensation="exact", reference=loader if reference else 0)
    before, after = States(), States()
    trained = lrp_prune.CorrectedModule(module) if corrected else module
    make_trainer(callbacks=[before, pruning, after], max_epochs=2).fit(trained, make_loader(), loader)
    dense, pruned = (inside(state.modules[1]) for state in (before, after))
    masked = copy.deepcopy(dense)
    masks = lrp_prune.prune(dense, list(loader), 0.6, rounds=1, compensation="exact")
    masks.apply_(masked)
    assert pruning.masks == masks
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(pruned.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    kept = {name: mask for name, mask in masks.items() if mask.any()}
    assert all(not torch.equal(pruned.state_dict()[name], masked.state_dict()[name]) for name in kept)


def test_dense_is_the_model_right_before_the_round(
    make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    """As it was trained since the round before, whose zeros it has; optimizer states stay as they are beside new zeros."""
    pruning = RelevancePruning(sparsity=0.7, rounds=2, schedule=[0.4, 0.7], compensation=EXACT)
    before, after, loader = States(), States(), make_loader(seed=2)
    masks: list[Any] = []
    after.on_train_epoch_end = lambda *_: masks.append(pruning.masks)  # type: ignore[method-assign]
    trainer = make_trainer(callbacks=[before, pruning, after], max_epochs=3)
    trainer.fit(make_module(), make_loader(), loader)
    assert masks[0] is None and masks[1].num_pruned < masks[2].num_pruned
    for epoch in (1, 2):
        expected = before.modules[epoch]
        found = compensate_(expected, masks[epoch], list(loader), EXACT)
        assert set(found.errors) == set(masks[epoch]) and all(after < before for before, after in found.errors.values())
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(after.modules[epoch].state_dict()[name], value, rtol=1e-4, atol=1e-6)
        for (name, parameter), index in zip(expected.named_parameters(), before.optimizers[epoch], strict=True):
            theirs, ours = before.optimizers[epoch][index], after.optimizers[epoch][index]
            mask = masks[epoch][name] if name in masks[epoch] else torch.ones_like(parameter, dtype=torch.bool)
            assert not parameter[~mask].any() and not ours["exp_avg"][~mask].any()
            assert all(torch.equal(ours[key][mask], theirs[key][mask]) for key in ("exp_avg", "exp_avg_sq"))
            assert torch.equal(ours["step"], theirs["step"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["none", "adamw"])
def test_an_average_moves_by_what_the_weights_move_by(
    optimizer: str, make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").EMAWeightAveraging
    pruning, before, after = RelevancePruning(sparsity=0.6, compensation="exact"), States(), States()
    trainer = make_trainer(callbacks=[before, pruning, after, averaging(decay=0.9)], max_epochs=2)
    trainer.fit(make_module(optimizer), make_loader(), make_loader(seed=2))
    masks, dense, pruned = pruning.masks, before.modules[1].state_dict(), after.modules[1].state_dict()
    (average,), (made,) = (state.averages[1] for state in (before, after))
    assert masks is not None
    for name, value in average.named_parameters():
        mask = masks[name] if name in masks else torch.ones_like(value, dtype=torch.bool)
        moved = (made.state_dict()[name] - value)[mask]
        torch.testing.assert_close(moved, (pruned[name] - dense[name])[mask], rtol=1e-4, atol=1e-6)
        assert not made.state_dict()[name][~mask].any()
        if optimizer == "none":  # an average of equal weights
            torch.testing.assert_close(made.state_dict()[name], pruned[name])
    assert optimizer == "none" or any(not torch.equal(average.state_dict()[name], dense[name]) for name in masks)


@pytest.mark.parametrize("failing", ["solving", "averaging", "keeping"])
def test_an_error_leaves_weights_and_averages_as_they_were(
    failing: str,
    make_module: Any,
    make_loader: Any,
    make_trainer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that what is written then has the round yet to come."""
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").EMAWeightAveraging

    class Failing(LeastSquares):
        def solve(self, *given: Any) -> torch.Tensor:
            found = super().solve(*given)
            if failing == "solving" and len(found) == 4:  # the last layer
                raise KeyError("not today")
            return found

    def broken(*_: Any) -> None:
        raise KeyError("not today")

    if failing == "averaging":
        monkeypatch.setattr("lrp_prune.callbacks._pruner._shift_", broken)
    if failing == "keeping":
        monkeypatch.setattr("lrp_prune.callbacks._pruner._mask_averages", broken)
    pruning, before, averages = RelevancePruning(0.6, compensation=Failing()), States(), averaging(decay=0.5)
    module = make_module()
    trainer = make_trainer(callbacks=[before, pruning, averages], max_epochs=2)
    with pytest.raises(KeyError, match="not today"):
        trainer.fit(module, make_loader(), make_loader(seed=2))
    assert (pruning.round, pruning.masks) == (0, None)
    check_as_before(before, 1, module, averages._average_model.module)


@pytest.mark.slow
def test_resumed_with_masks_that_wait_it_is_the_uninterrupted_training(
    make_module: Any, make_loader: Any, make_trainer: Callable[..., Any], same_weights: Any, tmp_path: Path
) -> None:
    class Reseed(Callback):
        """Lightning does not store the random state."""

        def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
            torch.manual_seed(trainer.global_step)

    def arguments() -> dict[str, Any]:
        checkpoint = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
        pruning = RelevancePruning(sparsity=0.7, rounds=2, compensation=OptimalBrainSurgeon(dense=0.25))
        return {"callbacks": [pruning, checkpoint, Reseed()], "max_epochs": 4, "enable_checkpointing": True}

    whole = make_module()
    make_trainer(**arguments()).fit(whole, make_loader(), make_loader(seed=2))
    for epoch in (0, 1):
        module = make_module(seed=9)
        trainer = make_trainer(**arguments())
        trainer.fit(module, make_loader(), make_loader(seed=2), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert same_weights(whole, module)


def test_the_table_and_the_log_say_what_was_done_and_what_it_cost(
    make_module: Any,
    make_loader: Any,
    make_trainer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "lrp_prune")
    shown: list[str] = []
    monkeypatch.setattr("lrp_prune.callbacks._round.show", lambda trainer, text: shown.append(text))
    few = make_loader(samples=8, batch_size=4, seed=2)
    for loader in (make_loader(seed=2), few):
        pruning = RelevancePruning(sparsity=0.6, rounds=2, compensation="exact", name="mine")
        make_trainer(callbacks=[pruning], max_epochs=3).fit(make_module("none"), make_loader(), loader)
    lines = [line for text in shown for line in text.splitlines() if line.startswith("compensated: ")]
    assert len(lines) == 4 and all(f"compensated on {number} samples in " in line for line, number in zip(
        lines, (64, 64, 8, 8), strict=True
    ))  # fmt: skip
    assert "in the median" in lines[0] and "only masked: net.*.weight (is reached by fewer than 16" in lines[2]
    infos = [record.message for record in caplog.records if record.message.startswith("mine: round ")]
    assert [info.partition(": ")[2].partition(": ")[0] for info in infos] == ["round 1", "round 2"] * 2
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["not compensated, only masked: net.*.weight (is reached by fewer than 16 samples or tokens)"]


@pytest.mark.slow
def test_a_preview_changes_nothing(
    make_module: Any, make_loader: Any, make_trainer: Callable[..., Any], same_weights: Any
) -> None:
    plain, previewed = make_module(), make_module()
    for module, callbacks in ((plain, []), (previewed, [RelevancePruning(compensation="exact", preview=True)])):
        torch.manual_seed(0)
        make_trainer(callbacks=callbacks, max_epochs=2).fit(module, make_loader(), make_loader(seed=2))
    assert same_weights(plain, previewed) and callbacks[0].previewed is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compensation": "best"}, r"compensation must be one of \['exact', 'obs'\].* got 'best'"),
        ({"compensation": True}, "compensation must be one of .* got True"),
        ({"compensation": LeastSquares}, "compensation must be one of"),
        ({"compensation": "obs", "recalibrate": True}, "leave recalibrate as it is"),
    ],
)
def test_what_cannot_be_is_refused_when_the_callback_is_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        RelevancePruning(**arguments)


@pytest.mark.slow
def test_without_batches_to_compensate_on_no_step_is_made(
    make_module: Any, make_loader: Any, make_trainer: Callable[..., Any]
) -> None:
    def fit(loader: Any, **options: Any) -> None:
        pruning = RelevancePruning(method="random", compensation="exact", **options)
        make_trainer(callbacks=[pruning], max_epochs=2).fit(module, make_loader(), loader)

    module = make_module()
    with pytest.raises(
        MisconfigurationException, match=r"compensation needs batches: a validation loader .* or reference="
    ):
        fit(None)
    assert not module.zeros_after_step
    fit(None, preview=True)
    module = make_module()
    fit(None, reference=make_loader(seed=2))
    assert len(module.zeros_after_step) == 8


@pytest.mark.slow
def test_all_batches_are_read_once_more_and_no_random_number_is_drawn(
    make_module: Any, make_loader: Any, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[int, bool]] = []

    def counting(model: Any, masks: Any, batches: Any, *given: Any, **options: Any) -> Compensated:
        state = torch.get_rng_state()
        found = compensate_(model, masks, batches, *given, **options)
        counted.append((found.samples, torch.equal(state, torch.get_rng_state())))
        return found

    monkeypatch.setattr("lrp_prune.callbacks._pruner.compensate_", counting)
    loader = make_loader(samples=640, batch_size=20, seed=2)
    for limit in (None, 3):
        pruning = RelevancePruning(method="magnitude", compensation="obs", max_batches=limit, reference=loader)
        make_trainer(callbacks=[pruning], max_epochs=2).fit(make_module(), make_loader(), None)
    assert counted == [(640, True), (60, True)]
