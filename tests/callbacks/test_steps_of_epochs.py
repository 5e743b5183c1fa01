"""How many epochs a number of steps is: known by the trainer's accumulation, or up to a module that steps by itself."""

import warnings
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lrp_prune.callbacks import RelevancePruning, Rounds


@pytest.mark.parametrize(("rounds", "steps", "fits"), [(4, 8, True), (4, 7, False), (3, 7, True)])
def test_a_schedule_of_accumulation_makes_epochs_longer(
    rounds: int, steps: int, fits: bool, make_module, make_loader, make_trainer
) -> None:
    """Four steps in the first epoch, one in each after it."""
    pruning = RelevancePruning(0.5, rounds=rounds, summary=False)
    callbacks = [pruning, GradientAccumulationScheduler({0: 1, 1: 4})]
    trainer = make_trainer(callbacks=callbacks, max_epochs=-1, max_steps=steps)
    if fits:
        trainer.fit(make_module(), make_loader(), make_loader(seed=2))
        assert pruning.round == rounds and trainer.current_epoch == steps - 3
        return
    with pytest.raises(
        MisconfigurationException, match=r"need 5 epochs, but .* \(max_steps=7\): set Trainer\(max_steps=8\)"
    ):
        trainer.fit(make_module(), make_loader(), make_loader(seed=2))


@pytest.mark.parametrize("method", ["lrp", "magnitude"])
@pytest.mark.parametrize(("every", "fits"), [(6, True), (7, False), (10, False)])
def test_steps_between_rounds_are_counted_by_the_schedule(
    every: int, fits: bool, method: Any, make_module, make_loader, make_trainer
) -> None:
    """Eight, four, one and one steps; validations after 8, 12 and 13."""
    pruning = RelevancePruning(0.5, Rounds(2, every_n_steps=every), method=method, summary=False)
    trainer = make_trainer(callbacks=[pruning, GradientAccumulationScheduler({0: 1, 1: 2, 2: 8})], max_epochs=4)
    if fits:
        trainer.fit(make_module(), make_loader(128), make_loader(seed=2))
        assert pruning.round == 2
        return
    with pytest.raises(
        MisconfigurationException, match=r"only 1 of them fit into the 14 steps .* about \d+ epochs are needed"
    ):
        trainer.fit(make_module(), make_loader(128), make_loader(seed=2))


def test_a_module_that_steps_by_itself_is_not_counted_for(make_manual_module, make_loader, make_trainer) -> None:
    def fit(**limits: Any) -> tuple[int, list[str]]:
        pruning = RelevancePruning(0.5, rounds=2, summary=False)
        trainer = make_trainer(callbacks=[pruning], **limits)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(make_manual_module(), make_loader(), make_loader(seed=2))
        return pruning.round, [str(entry.message) for entry in caught if "is up to the module" in str(entry.message)]

    assert fit(max_epochs=3) == (2, [])
    rounds, (told,) = fit(max_epochs=-1, max_steps=18)  # six steps an epoch
    assert rounds == 2 and "2 rounds need 3 epochs; how many fit into max_steps=18" in told
