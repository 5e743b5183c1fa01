"""Methods of units inside trainings: half of each layer's units go, the table tells of which, and two processes agree."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lrp_prune.callbacks import RelevancePruning
from lrp_prune.pruning import UNIT_METHODS
from tests.support.trainers import forked

UNITS: dict[str, Any] = {"granularity": "neuron", "scope": "layer"}


def kept(module: Any) -> list[int]:
    """Neurons that put out anything, by hidden layer."""
    return [int(layer.weight.any(1).sum()) for layer in module.net if isinstance(layer, torch.nn.Linear)][:-1]


@pytest.mark.parametrize("method", UNIT_METHODS)
def test_half_of_the_units_of_each_layer_go_and_the_table_says_of_what(
    method: str, make_module: Any, make_loader: Any, make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    monkeypatch.setattr("lrp_prune.callbacks._round.show", lambda trainer, text: texts.append(text))
    pruning = RelevancePruning(0.5, rounds=2, schedule="linear", method=method, **UNITS)
    module = make_module()
    make_trainer(callbacks=[pruning], max_epochs=3).fit(module, make_loader(), make_loader(seed=2))
    assert kept(module) == [12, 8]
    assert pruning.masks.sparsity > 0.5  # what two units share is there once
    assert [text.splitlines()[0].split(" on ")[0] for text in texts] == [
        f"Pruning round {number} of 2 by {method}" for number in (1, 2)
    ]
    assert "(target 25.00% of the neurons): " in texts[0] and "(target 50.00% of the neurons): " in texts[1]


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_score_what_both_have_collected(
    make_module: Any, make_loader: Any, make_trainer: Any, tmp_path: Path
) -> None:
    """Also where scores do not add, as Taylor's, which are in units of the layer's length."""

    class Save(Callback):
        def __init__(self, path: Path, prunings: list[RelevancePruning]) -> None:
            self.path, self.prunings = path, prunings

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            found = [pruning.previewed.checksum() for pruning in self.prunings]
            self.path.with_suffix(f".{trainer.global_rank}").write_bytes(pickle.dumps(found))

    for devices in (1, 2):
        prunings = [
            RelevancePruning(
                0.5,
                method=method,
                granularity="neuron",
                scope="global",
                reference=make_loader(seed=5),
                preview=True,
                summary=False,
                name=method,
            )
            for method in UNIT_METHODS
        ]
        save = Save(tmp_path / str(devices), prunings)
        strategy = forked() if devices > 1 else "auto"
        trainer = make_trainer(callbacks=[*prunings, save], devices=devices, strategy=strategy, max_epochs=2)
        module = make_module(optimizer="none")  # training is to change nothing, so that both score the same model
        module.net[1].momentum = 0.0
        trainer.fit(module, make_loader(), make_loader(seed=2))
    one, first, second = (pickle.loads((tmp_path / name).read_bytes()) for name in ("1.0", "2.0", "2.1"))
    assert one == first == second
