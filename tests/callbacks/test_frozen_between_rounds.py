"""Weights that a training freezes between rounds are named, with the sparsity that is left to be reached."""

import warnings
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lrp_prune.callbacks import RelevancePruning
from lrp_prune.pruning import Scope

TOLD = "cannot be pruned any more, being frozen since"


class Freezing(Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            pl_module.net[0].requires_grad_(False)


def told(run: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(entry.message) for entry in caught if TOLD in str(entry.message)]


@pytest.mark.parametrize(
    "arguments", [{}, {"scope": "layer"}, {"method": "magnitude"}, {"granularity": "neuron"}], ids=str
)
def test_they_are_named_once_with_what_they_leave(make_module, make_loader, make_trainer, arguments) -> None:
    pruning = RelevancePruning(0.8, rounds=4, schedule="linear", summary=False, **arguments)
    trainer = make_trainer(callbacks=[pruning, Freezing()], max_epochs=6)
    (message,) = told(lambda: trainer.fit(make_module(), make_loader(), make_loader(seed=2)))
    assert pruning.round == 4 and "net.0.weight" in message and "include=" in message and "0.8" in message
    assert "net.4.weight" not in message
    if "granularity" not in arguments:  # of units what is left is told as if the last round came now
        assert f"leave {pruning.masks.sparsity:.2%} of all {pruning.masks.num_entries:,} weights" in message


def test_weights_that_no_round_has_pruned_yet_count_as_well(make_module, make_loader, make_trainer) -> None:
    module, pruning = make_module(), RelevancePruning(0.5, summary=False)
    freezing = Freezing()
    freezing.on_train_epoch_start = lambda trainer, module: module.net[0].requires_grad_(False)
    trainer = make_trainer(callbacks=[freezing, pruning], max_epochs=2)
    (message,) = told(lambda: trainer.fit(module, make_loader(), make_loader(seed=2)))
    whole = sum(module.net[index].weight.numel() for index in (0, 4, 6))
    assert f"leave {pruning.masks.num_pruned / whole:.2%} of all {whole:,} weights" in message


def test_a_resume_that_freezes_tells_at_the_next_round(make_module, make_loader, make_trainer, tmp_path) -> None:
    def fit(module: Any, path: Any = None) -> RelevancePruning:
        pruning = RelevancePruning(0.8, rounds=4, schedule="linear", summary=False)
        kept = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer = make_trainer(callbacks=[pruning, kept], enable_checkpointing=True, max_epochs=6)
        trainer.fit(module, make_loader(), make_loader(seed=2), ckpt_path=path)
        return pruning

    assert not told(lambda: fit(make_module("none")))
    frozen = make_module("none")
    frozen.net[0].requires_grad_(False)
    (message,) = told(lambda: fit(frozen, tmp_path / "epoch=2.ckpt"))
    assert "net.0.weight" in message


def test_rounds_that_the_rest_cannot_bear_say_why(make_module, make_loader, make_trainer) -> None:
    module = make_module("none")
    with torch.no_grad():
        module.net[0].weight.mul_(100.0)  # so that little of it is pruned before it is frozen, and much of the others
    schedule, scope = [0.5, 0.51, 0.52], Scope("global", floor=0.0)
    pruning = RelevancePruning(0.52, schedule=schedule, method="magnitude", scope=scope, summary=False)
    trainer = make_trainer(callbacks=[Freezing(), pruning], max_epochs=5)
    with pytest.raises(MisconfigurationException, match=f"pruned already.*net.0.weight {TOLD}.*include="):
        trainer.fit(module, make_loader(), make_loader(seed=2))
