"""What cannot work is refused before anything changes."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lrp_prune.callbacks import ContrastiveCorrection, Distillation, RelevanceCollector, RelevancePruning, Rounds


@pytest.mark.parametrize(
    ("callback", "trainer_arguments", "message"),
    [
        ({"rounds": 3}, {"max_epochs": 3}, r"need 4 epochs.*max_epochs=4"),
        ({"rounds": Rounds(2, every_n_epochs=3)}, {"max_epochs": 4}, "need 5 epochs"),
        ({"rounds": 2}, {"max_steps": 8}, "need 3 epochs"),
        ({"rounds": 2}, {"max_epochs": 4, "check_val_every_n_epoch": 2}, "check_val_every_n_epoch=2"),
        ({"rounds": Rounds(2, every_n_steps=6)}, {"max_epochs": 3}, "steps"),
        ({"rounds": Rounds(2, every_n_steps=6), "method": "magnitude"}, {"max_epochs": 3}, "13 optimizer"),
        ({}, {"max_epochs": 3, "limit_val_batches": 0}, "reference="),
        ({"include": ["nothing_like_this"]}, {"max_epochs": 3}, "nothing_like_this"),
    ],
)
def test_what_cannot_work_is_refused_before_a_weight_changes(
    make_module, make_loader, make_trainer, same_weights, callback, trainer_arguments, message
) -> None:
    module = make_module()
    before = copy.deepcopy(module)
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(callbacks=[RelevancePruning(**callback)], **trainer_arguments).fit(
            module, make_loader(), make_loader(seed=2)
        )
    assert same_weights(before, module)


def test_unreachable_structures_and_damaged_relevance_change_no_weight(
    make_module, make_loader, make_trainer, same_weights
) -> None:
    module = make_module()
    # 8 and 24 and 16 inputs: 5 does not divide them, which is known when the module is, before it is trained.
    with pytest.raises(MisconfigurationException, match="2:5"):
        make_trainer(callbacks=[RelevancePruning(sparsity=0.6, scope="2:5")], max_epochs=2).fit(
            module, make_loader(), make_loader(seed=2)
        )
    assert module.zeros_after_step == []

    module = make_module()
    loader = make_loader(seed=2)
    loader.dataset.tensors[0][40] = float("nan")
    with pytest.raises(FloatingPointError, match="the explained value is nan: the model's output is not finite"):
        make_trainer(callbacks=[RelevancePruning()], max_epochs=2).fit(module, make_loader(), loader)
    assert module.zeros_after_step == [0] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"\[0, 1\)"),
        ({"sparsity": -0.1}, r"\[0, 1\)"),
        ({"sparsity": "half"}, r"\[0, 1\)"),
        ({"sparsity": {}}, "pattern"),
        ({"rounds": 0}, "rounds"),
        ({"rounds": 1.5}, "rounds"),
        ({"schedule": "cubical"}, "schedule"),
        ({"schedule": [0.5], "rounds": 2}, "2"),
        ({"schedule": [0.5, 0.2], "rounds": 2}, "0.2"),
        ({"schedule": [0.2, 0.5], "rounds": 1}, "2 entries for rounds=1"),
        ({"schedule": [0.2, 0.5], "rounds": Rounds(3, every_n_steps=2)}, "2 entries for rounds=3"),
        ({"schedule": [0.2, 0.4]}, "ends at 0.4, and the sparsity to reach is 0.5"),
        ({"schedule": lambda number: 0.5}, "pass rounds="),
        ({"schedule": lambda number: 0.3, "rounds": 1}, "ends at 0.3"),
        ({"schedule": 3}, "schedule must be one of"),
        ({"rounds": Rounds(start=0)}, "reference="),
        ({"method": "sparsegpt"}, "method"),
        ({"scope": "rows"}, "scope"),
        ({"scope": "5:4"}, "scope"),
        ({"scope": "2:4", "sparsity": 0.7}, "sparsity=0.5"),
        ({"scope": "2:4", "sparsity": 0.5, "rounds": 2}, "rounds=1"),
        ({"scope": 3}, "scope"),
        ({"monitor_mode": "least"}, "monitor_mode"),
        ({"monitor": 3}, "monitor must be None or the name of a metric .* got 3"),
        ({"recalibrate": "yes"}, "recalibrate must be True or False, got 'yes'"),
        ({"recalibrate": None}, "recalibrate must be True or False, got None"),
        ({"summary": 1}, "summary must be True or False, got 1"),
        ({"preview": 0}, "preview must be True or False, got 0"),
        ({"allow_untested": "ddp"}, "allow_untested must be True or False, got 'ddp'"),
        ({"reference": []}, "reference is an empty list: pass at least one batch"),
        ({"reference": ()}, "reference is an empty tuple"),
        ({"reference": DataLoader([])}, "reference is an empty DataLoader"),
        ({"reference": [], "method": "magnitude"}, "reference is an empty list"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, message) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        RelevancePruning(**arguments)


@pytest.mark.parametrize("rounds", [None, Rounds(every_n_steps=2)])
def test_a_list_says_how_many_rounds_there_are(
    rounds: Any, make_module: Any, make_loader: Any, make_trainer: Any
) -> None:
    pruning = RelevancePruning(schedule=[0.2, 0.3, 0.5], rounds=rounds, method="magnitude")
    make_trainer(callbacks=[pruning], max_epochs=4).fit(make_module(), make_loader(), make_loader(seed=2))
    assert pruning.round == 3
    assert pruning.masks.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_epochs": 1, "every_n_steps": 10}, "exclude each other"),
        ({"every_n_epochs": 0}, "every_n_epochs"),
        ({"every_n_steps": -5}, "every_n_steps"),
        ({"start": -1}, "start"),
        ({"count": 0}, "rounds"),
    ],
)
def test_rounds_at_impossible_times_are_refused(arguments, message) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        Rounds(**arguments)


def test_module_without_anything_to_run(make_loader, make_trainer) -> None:
    from lightning.pytorch import LightningModule

    class Opaque(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self.second(self.first(batch[0])), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = make_trainer(callbacks=[RelevancePruning()], max_epochs=2)
    with pytest.raises(MisconfigurationException, match="relevance_target"):
        trainer.fit(Opaque(), make_loader(), make_loader())
    Opaque.relevance_target = lambda self, batch: self.second(self.first(batch[0])).amax(dim=-1).sum()
    pruning = RelevancePruning(scope="global")
    make_trainer(callbacks=[pruning], max_epochs=2).fit(Opaque(), make_loader(), make_loader())
    assert pruning.masks.num_pruned == (64 + 32) // 2


@pytest.mark.parametrize("callback", [RelevancePruning, RelevanceCollector, ContrastiveCorrection, Distillation])
def test_a_trainer_of_the_sibling_package_is_told_what_to_import(callback: Any, make_module) -> None:
    kind = type("SingleDeviceStrategy", (), {"__module__": "pytorch_lightning.strategies.single_device"})
    trainer: Any = SimpleNamespace(strategy=kind())
    with pytest.raises(
        MisconfigurationException, match=f"^{callback.__name__} is .*import Trainer.* from lightning.pytorch"
    ):
        callback(allow_untested=True).setup(trainer, make_module(), "fit")
