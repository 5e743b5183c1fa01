"""A callback that was pickled or copied goes on with the model that it has pruned, and begins anew with another."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lrp_prune.callbacks import (
    ContrastiveCorrection,
    Distillation,
    LearningRateRewinding,
    RelevanceCollector,
    RelevancePruning,
    RoundQuality,
)


@pytest.mark.parametrize("copied", [lambda pruning: pickle.loads(pickle.dumps(pruning)), copy.deepcopy])
def test_its_masks_hold_in_the_same_model(copied: Any, make_module, make_loader, make_trainer, count_zeros) -> None:
    module, pruning = make_module(), RelevancePruning(0.6, summary=False)
    make_trainer(callbacks=[pruning], max_epochs=2).fit(module, make_loader(), make_loader(seed=2))
    zeros, again = count_zeros(module), copied(pruning)
    make_trainer(callbacks=[again], max_epochs=2).fit(module, make_loader(), make_loader(seed=2))
    assert again.round == 1 and set(module.zeros_after_step[-8:]) == {zeros} and zeros > 300


@pytest.mark.parametrize("wrong", ["has pruned weights that are not zero", "has other weights"])
def test_masks_of_another_model_are_given_up_by_name(wrong: str, make_module, make_loader, make_trainer) -> None:
    module, pruning = make_module(), RelevancePruning(0.6, summary=False)
    make_trainer(callbacks=[pruning], max_epochs=2).fit(module, make_loader(), make_loader(seed=2))
    other, again = make_module(seed=1), pickle.loads(pickle.dumps(pruning))
    if "other" in wrong:
        other.net[4] = torch.nn.Sequential(torch.nn.Linear(24, 16))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callbacks=[again], max_epochs=2).fit(other, make_loader(), make_loader(seed=2))
    (told,) = [str(entry.message) for entry in caught if "given up" in str(entry.message)]
    assert f"the masks of 1 earlier rounds are given up, as this model {wrong}" in told


HOOKS = ["on_sanity_check_start", "on_sanity_check_end", "on_train_start", "on_train_epoch_start", "on_train_batch_start",
         "on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_validation_batch_start",
         "on_validation_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end", "on_fit_end"]  # fmt: skip


class Copying(Callback):
    """Pickles and copies all others, in each hook."""

    def __init__(self) -> None:
        self.copies = list[Any]()
        for hook in HOOKS:
            setattr(self, hook, self.copy)

    def copy(self, trainer: Any, *_: Any) -> None:
        for callback in trainer.callbacks:
            if callback is not self:
                pickled = pickle.dumps(callback)
                if isinstance(callback, RelevancePruning) and callback.round and trainer.global_step < 8:
                    self.copies = [pickle.loads(pickled), copy.deepcopy(callback)]


@pytest.mark.parametrize("first", [True, False])
def test_any_moment_of_a_training_will_do(first: bool, make_module, make_loader, make_trainer, count_zeros) -> None:
    dense = [(torch.randn(8, 8), torch.zeros(8, dtype=torch.long))]
    ours = [
        RelevancePruning(0.6, rounds=2, summary=False),
        LearningRateRewinding(),
        Distillation(),
        RelevanceCollector(),
    ]
    ours += [RoundQuality("val_loss", margin=9.0), ContrastiveCorrection(0, dense, amount=0.05)]
    module, copying = make_module(), Copying()
    trainer = make_trainer(callbacks=[copying, *ours] if first else [*ours, copying], max_epochs=3)
    trainer.fit(module, make_loader(), make_loader(seed=2))
    for again in copying.copies:
        trained = make_module()
        trained.load_state_dict(module.state_dict())
        make_trainer(callbacks=[again], max_epochs=3, num_sanity_val_steps=0).fit(
            trained, make_loader(), make_loader(seed=2)
        )
        assert again.round == 2 and trained.zeros_after_step[-1] >= 380
    assert copying.copies
