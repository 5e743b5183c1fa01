"""A callback that was pickled or copied goes on with the model that it has pruned, and begins anew with another."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch

from lrp_prune.callbacks import RelevancePruning


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
