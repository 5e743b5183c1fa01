"""What a checkpoint of a pruning training holds, what a resume brings back, and which checkpoint is the best."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lrp_prune.callbacks import RelevancePruning

ENTRIES = 8 * 24 + 24 * 16 + 16 * 4
METHODS = ["lrp", "wanda", "gradient", "magnitude", "random"]


def test_callback_is_pickled_after_a_fit(make_module, make_loader, make_trainer) -> None:
    pruning = RelevancePruning(sparsity=0.5)
    make_trainer(callbacks=[pruning], max_epochs=2).fit(make_module(), make_loader(), make_loader(seed=2))
    assert pickle.loads(pickle.dumps(pruning)).masks == pruning.masks


@pytest.mark.slow
def test_checkpoints_hold_no_pruned_weights_under_an_earlier_metric(
    make_module, make_loader, make_trainer, count_zeros, tmp_path
) -> None:
    """The state dict of each file gives the metric that the file is named after."""
    module = make_module()
    pruning = RelevancePruning(sparsity=0.7, rounds=3, schedule="linear")
    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_top_k=-1, filename="{epoch}-{val_loss:.6f}")
    trainer = make_trainer(callbacks=[pruning, checkpoint], max_epochs=4, enable_checkpointing=True)
    trainer.fit(module, make_loader(), make_loader(seed=2))
    assert len(checkpoint.best_k_models) == 4
    for path, metric in checkpoint.best_k_models.items():
        saved = torch.load(path, weights_only=True)
        twin = make_module()
        twin.load_state_dict(saved["state_dict"])
        measured = make_trainer().validate(twin, make_loader(seed=2), verbose=False)[0]["val_loss"]
        assert measured == pytest.approx(float(metric), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resume_in_the_middle_equals_the_uninterrupted_run(
    make_module, make_loader, make_trainer, same_weights, tmp_path, method, optimizer
) -> None:
    def arguments() -> dict[str, Any]:
        checkpoint = ModelCheckpoint(dirpath=tmp_path / "c", save_top_k=-1, filename="{epoch}")
        pruning = RelevancePruning(sparsity=0.7, rounds=3, schedule="cubic", method=method)
        return {"callbacks": [pruning, checkpoint, Reseed()], "max_epochs": 5, "enable_checkpointing": True}

    class Reseed(Callback):
        """Lightning does not store the random state."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            torch.manual_seed(trainer.global_step)

    whole = make_module(optimizer=optimizer)
    uninterrupted = arguments()
    make_trainer(**uninterrupted).fit(whole, make_loader(), make_loader(seed=2))
    paths = sorted(Path(tmp_path / "c").glob("*.ckpt"))
    assert len(paths) == 5
    for path in paths[:4]:
        resumed, module = arguments(), make_module(optimizer=optimizer, seed=9)
        make_trainer(**resumed).fit(module, make_loader(), make_loader(seed=2), ckpt_path=path)
        assert same_weights(whole, module), path
        assert resumed["callbacks"][0].masks == uninterrupted["callbacks"][0].masks


@pytest.mark.slow
def test_resume_within_an_epoch_keeps_zeros_and_prunes_on_time(
    make_module, make_loader, make_trainer, tmp_path
) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    arguments = {"sparsity": 0.5, "rounds": 2, "schedule": "linear", "scope": "global"}
    trainer = make_trainer(
        callbacks=[RelevancePruning(**arguments), checkpoint], max_epochs=3, enable_checkpointing=True
    )
    whole = make_module()
    trainer.fit(whole, make_loader(), make_loader(seed=2))
    for step in range(1, 12):
        module = make_module(seed=9)
        trainer = make_trainer(callbacks=[RelevancePruning(**arguments)], max_epochs=3)
        trainer.fit(module, make_loader(), make_loader(seed=2), ckpt_path=tmp_path / f"step={step}.ckpt")
        expected = whole.zeros_after_step[step:]
        assert module.zeros_after_step[-len(expected) :] == expected, step


@pytest.mark.slow
def test_checkpoint_loads_with_weights_only_and_packs_masks(make_module, make_loader, make_trainer, tmp_path) -> None:
    trainer = make_trainer(callbacks=[RelevancePruning(sparsity=0.5, rounds=2, schedule="linear")], max_epochs=3)
    trainer.fit(make_module(), make_loader(), make_loader(seed=2))
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    saved = torch.load(tmp_path / "file.ckpt", weights_only=True)
    state = next(value for name, value in saved["callbacks"].items() if "RelevancePruning" in name)
    assert state["version"] == 1
    assert sum(bits.numel() for bits in state["masks"]["bits"].values()) == ENTRIES // 8


def test_state_of_another_version_is_refused() -> None:
    pruning = RelevancePruning()
    state = pruning.state_dict()
    with pytest.raises(MisconfigurationException, match="version 7"):
        pruning.load_state_dict({**state, "version": 7})


def test_resuming_with_other_arguments_warns() -> None:
    state = RelevancePruning(sparsity=0.5).state_dict()
    with pytest.warns(UserWarning, match=r"0\.7.*was.*0\.5"):
        RelevancePruning(sparsity=0.7).load_state_dict(state)


@pytest.mark.slow
def test_guarded_metric_keeps_the_best_at_the_final_sparsity(
    make_module, make_loader, make_trainer, count_zeros, tmp_path
) -> None:
    pruning = RelevancePruning(sparsity=0.9, rounds=2, schedule="linear", monitor="val_loss", scope="global")
    best = ModelCheckpoint(dirpath=tmp_path, monitor="pruning/val_loss", mode="min")
    patient = EarlyStopping(monitor="pruning/val_loss", patience=1)
    module = make_module()
    trainer = make_trainer(callbacks=[pruning, best, patient], max_epochs=5, enable_checkpointing=True)
    trainer.fit(module, make_loader(), make_loader(seed=2))
    twin = make_module()
    saved = torch.load(best.best_model_path, weights_only=True)
    twin.load_state_dict(saved["state_dict"])
    assert count_zeros(twin) == round(0.9 * ENTRIES)
    measured = make_trainer().validate(twin, make_loader(seed=2), verbose=False)[0]["val_loss"]
    assert measured == pytest.approx(float(best.best_model_score), abs=1e-6)


def test_unguarded_monitors_are_warned_about(make_module, make_loader, make_trainer, tmp_path) -> None:
    callbacks = [
        RelevancePruning(method="magnitude"),
        ModelCheckpoint(dirpath=tmp_path, monitor="val_loss"),
        EarlyStopping(monitor="val_loss"),
    ]
    trainer = make_trainer(callbacks=callbacks, max_epochs=2, enable_checkpointing=True)
    with pytest.warns(UserWarning) as caught:
        trainer.fit(make_module(), make_loader(), make_loader())
    messages = [str(warning.message) for warning in caught]
    assert any("ModelCheckpoint(monitor='val_loss')" in message for message in messages)
    assert any("EarlyStopping(monitor='val_loss')" in message for message in messages)
