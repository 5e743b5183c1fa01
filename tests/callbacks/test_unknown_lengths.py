"""Rounds by steps in a training whose loader does not tell how many batches an epoch has."""

from collections.abc import Iterator
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lrp_prune.callbacks import RelevancePruning, Rounds

ROUNDS = Rounds(2, every_n_steps=6)


class Stream(IterableDataset[Any]):
    """Four batches an epoch, of which nobody knows before."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader.dataset)


def streamed(loader: DataLoader[Any]) -> DataLoader[Any]:
    return DataLoader(Stream(loader), loader.batch_size)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    "limits",
    [
        {"max_steps": 20, "max_epochs": -1},
        {"max_epochs": 5},
        {"max_steps": 20, "max_epochs": -1, "val_check_interval": 3, "check_val_every_n_epoch": None},
        {"max_steps": 20, "max_epochs": 5, "val_check_interval": 2},
        {"max_steps": 20, "max_epochs": -1, "accumulate_grad_batches": 2},
    ],
    ids=["steps", "epochs", "validations by batches", "validations within epochs", "accumulated"],
)
def test_the_rounds_take_place(limits: Any, reference: bool, make_module, make_loader, make_trainer) -> None:
    options = {"reference": make_loader(seed=3)} if reference else {}
    pruning = RelevancePruning(0.5, ROUNDS, summary=False, **options)
    make_trainer(callbacks=[pruning], **limits).fit(make_module(), streamed(make_loader()), make_loader(seed=2))
    assert pruning.round == 2
    assert pruning.masks.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"max_steps": 12},
            "need 13 optimizer steps.*only 1 of them fit into the 12 steps.*a larger max_steps is needed",
        ),
        ({"max_steps": 12, "val_check_interval": 10, "check_val_every_n_epoch": None}, "only 1 of them fit"),
        ({"max_steps": 20, "val_check_interval": 11, "check_val_every_n_epoch": None}, "only 1 of them fit"),
    ],
)
def test_what_cannot_fit_is_refused_all_the_same(
    limits: Any, message: str, make_module, make_loader, make_trainer
) -> None:
    trainer = make_trainer(callbacks=[RelevancePruning(0.5, ROUNDS)], max_epochs=-1, **limits)
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(make_module(), streamed(make_loader()), make_loader(seed=2))


def test_epochs_that_were_too_few_are_told_at_the_end(make_module, make_loader, make_trainer) -> None:
    pruning = RelevancePruning(0.5, ROUNDS, summary=False)
    with pytest.warns(UserWarning, match="the training ended after 0 of 2 pruning rounds"):
        make_trainer(callbacks=[pruning], max_epochs=1).fit(make_module(), streamed(make_loader()), make_loader(seed=2))
