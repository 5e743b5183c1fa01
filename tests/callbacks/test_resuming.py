"""What a user is told about resumes: what is lost without anybody's fault, and what a checkpoint does not know of pruning."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lrp_prune.callbacks import RelevancePruning, Rounds


def told(function: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(warning.message) for warning in caught]


@pytest.mark.slow
def test_a_checkpoint_within_a_window_is_warned_about_once(make_module, make_loader, make_trainer, tmp_path) -> None:
    def fit(path: Path | None = None, **arguments: Any) -> list[str]:
        checkpoint = ModelCheckpoint(tmp_path / "files", "{epoch}-{step}", save_top_k=-1, every_n_epochs=1)
        callbacks = [RelevancePruning(sparsity=0.5, rounds=2), checkpoint]
        trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=3, **arguments)
        return told(lambda: trainer.fit(make_module(), make_loader(), make_loader(seed=2), ckpt_path=path))

    whole = {"accumulate_grad_batches": 2, "val_check_interval": 2}
    assert not [text for text in fit(**whole) if "Lightning does not store" in text]
    inside = {"accumulate_grad_batches": 2, "val_check_interval": 3}
    (message,) = [text for text in fit(**inside) if "Lightning does not store" in text]
    assert "after batch 3 of the epoch" in message and "window of 2 batches" in message
    newest = next(path for path in (tmp_path / "files").glob("epoch=1*") if _batches(path) == 3)
    (message,) = [text for text in fit(newest, **inside) if "lacks what" in text]
    assert "gradients accumulated over part of a window of 2 batches" in message
    assert "random generators, which 'net.3' draws from" in message


def _batches(path: Path) -> int:
    progress = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return int(progress["current"]["ready"])


@pytest.mark.slow
def test_nothing_is_said_where_nothing_is_lost(make_module, make_loader, make_trainer, tmp_path) -> None:
    def module() -> Any:
        made = make_module()
        made.net[3] = nn.Identity()
        return made

    def trainer() -> Any:
        checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        return make_trainer(
            callbacks=[RelevancePruning(sparsity=0.5), checkpoint], enable_checkpointing=True, max_epochs=3
        )

    first = told(lambda: trainer().fit(module(), make_loader(), make_loader(seed=2)))
    path = tmp_path / "epoch=1.ckpt"
    second = told(lambda: trainer().fit(module(), make_loader(), make_loader(seed=2), ckpt_path=path))
    for text in [*first, *second]:
        assert not any(part in text for part in ("Lightning does not store", "lacks what", "was written without")), text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message", "rounds_at"),
    [
        ({}, "delayed by 2 epochs", [3, 4]),
        ({"rounds": Rounds(2, start=4)}, "keep their times", [4, 5]),
        ({"method": "magnitude"}, "delayed by 1 epochs", [2, 3]),
        ({"rounds": Rounds(2, every_n_steps=3)}, "delayed by 5 steps", [3, 4]),
        ({"rounds": Rounds(2, every_n_steps=3), "method": "magnitude"}, "delayed by 5 steps", [2, 3]),
    ],
)
def test_pruning_begins_late_in_a_training_begun_without_it(
    make_module, make_loader, make_trainer, count_zeros, tmp_path, arguments, message, rounds_at
) -> None:
    """From the resume on, with the time between rounds that was asked for, not all rounds at once."""
    trainer = make_trainer(max_epochs=2)
    trainer.fit(make_module(), make_loader(), make_loader(seed=2))
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    pruning = RelevancePruning(sparsity=0.5, schedule="linear", scope="global", **{"rounds": 2, **arguments})
    module = make_module()
    trainer = make_trainer(callbacks=[pruning], max_epochs=6)
    messages = told(lambda: trainer.fit(module, make_loader(), make_loader(seed=2), ckpt_path=tmp_path / "dense.ckpt"))
    (found,) = [text for text in messages if "was written without RelevancePruning" in text]
    assert message in found
    zeros, entries = module.zeros_after_step, 640
    begins = [next(step for step, count in enumerate(zeros) if count == entries * part // 4) for part in (1, 2)]
    if "steps" in message:
        assert begins[1] - begins[0] >= 3
        assert begins[0] == {"lrp": 4, "magnitude": 0}[arguments.get("method", "lrp")]
    else:
        assert [2 + begin // 4 for begin in begins] == rounds_at


def test_a_late_beginning_that_does_not_fit_says_how_many_epochs_would(
    make_module, make_loader, make_trainer, tmp_path
) -> None:
    trainer = make_trainer(max_epochs=3)
    trainer.fit(make_module(), make_loader(), make_loader(seed=2))
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    late = make_trainer(callbacks=[RelevancePruning(rounds=3)], max_epochs=5)
    with pytest.raises(MisconfigurationException, match="max_epochs=7"):
        late.fit(make_module(), make_loader(), make_loader(seed=2), ckpt_path=tmp_path / "dense.ckpt")


def test_continued_without_the_callback_the_weights_load_and_lightning_names_it(
    make_module, make_loader, make_trainer, same_weights, tmp_path
) -> None:
    module = make_module()
    trainer = make_trainer(callbacks=[RelevancePruning(sparsity=0.5)], max_epochs=2)
    trainer.fit(module, make_loader(), make_loader(seed=2))
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    twin = make_module(seed=4)
    messages = told(lambda: make_trainer(max_epochs=2).fit(twin, make_loader(), ckpt_path=tmp_path / "pruned.ckpt"))
    assert any("RelevancePruning" in text for text in messages)
    assert same_weights(module, twin)
    assert torch.load(tmp_path / "pruned.ckpt", weights_only=True)["state_dict"].keys() == twin.state_dict().keys()


@pytest.fixture
def interrupted(make_module, make_loader, make_trainer, tmp_path) -> Any:
    """Resumes from after the first of three rounds on a linear schedule to 0.6, with the masks of the second waiting."""

    def fit(pruning: RelevancePruning, path: Path | None = None) -> tuple[RelevancePruning, Any]:
        kept = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer = make_trainer(callbacks=[pruning, kept], enable_checkpointing=True, max_epochs=5)
        module = make_module()
        fit.steps = module.zeros_after_step
        trainer.fit(module, make_loader(), make_loader(seed=2), ckpt_path=path)
        return pruning, trainer

    fit(RelevancePruning(0.6, 3, schedule="linear", scope="layer", summary=False))
    return partial(fit, path=tmp_path / "epoch=1.ckpt")


def test_fewer_rounds_than_are_done_prune_nothing_more(interrupted) -> None:
    given = RelevancePruning(0.6, 1, scope="layer", monitor="val_loss", summary=False)
    with pytest.warns(UserWarning, match="all of its 1 rounds are done"):
        pruning, trainer = interrupted(given)
    assert pruning.round == 1 and pruning.masks.sparsity == pytest.approx(0.2, abs=2e-3)
    assert trainer.callback_metrics["pruning/val_loss"] == trainer.callback_metrics["val_loss"]


def test_more_rounds_done_than_asked_for_count_as_all(make_module, make_loader, make_trainer, tmp_path) -> None:
    first = make_trainer(callbacks=[RelevancePruning(0.6, 3, summary=False)], max_epochs=4)
    first.fit(make_module(), make_loader(), make_loader(seed=2))
    first.save_checkpoint(tmp_path / "done.ckpt")
    trainer = make_trainer(callbacks=[RelevancePruning(0.6, 1, monitor="val_loss", summary=False)], max_epochs=5)
    trainer.fit(make_module(), make_loader(), make_loader(seed=2), ckpt_path=tmp_path / "done.ckpt")
    assert trainer.callback_metrics["pruning/val_loss"] == trainer.callback_metrics["val_loss"]


def test_masks_that_wait_are_selected_anew_by_what_is_asked_for_now(interrupted) -> None:
    pruning, _ = interrupted(RelevancePruning(0.9, 2, schedule="linear", scope="layer", summary=False))
    assert pruning.round == 2 and pruning.masks.sparsity == pytest.approx(0.9, abs=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.1, "rounds": 3}, r"of net\..* are pruned already, more than the"),
        (
            {"sparsity": 0.19, "rounds": 2, "schedule": "linear", "scope": "global"},
            "128 of 640 entries .* than the 122 ",
        ),
        ({"sparsity": {"net.0*": 0.5, "net.4*": 0.1}, "rounds": 2}, "77 of 384 entries of net.4.weight"),
        (
            {"sparsity": 0.25, "rounds": 2, "schedule": [0.25, 0.25], "scope": "6:8"},
            r"of 8 entries of a row of net\..*the 2 ",
        ),
        ({"sparsity": 0.25, "rounds": 2, "scope": "row"}, "entries of a row of net"),
    ],
    ids=str,
)
def test_less_than_is_pruned_is_refused_before_the_training(interrupted, arguments, message) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        interrupted(RelevancePruning(summary=False, **{"scope": "layer", **arguments}))
    assert not interrupted.func.steps
