"""A module in training as it is at each epoch's start."""

import copy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule

import lrp_prune


class States(Callback):
    """The module, its optimizer and averages of it at each epoch's start: before pruning if it stands before it, else after."""

    def __init__(self) -> None:
        self.modules: list[Any] = []
        self.optimizers: list[Any] = []
        self.averages: list[Any] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
        with pl_module.uncorrected() if isinstance(pl_module, lrp_prune.CorrectedModule) else torch.no_grad():
            self.modules.append(copy.deepcopy(pl_module))
        self.optimizers.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))
        averages = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
        self.averages.append([copy.deepcopy(entry.module) for entry in averages if entry is not None])


def check_as_before(before: States, epoch: int, module: LightningModule, average: torch.nn.Module) -> None:
    """A module, and the one average of it, are bit for bit as they were when an epoch began."""
    (known,) = before.averages[epoch]
    for found, expected in ((module, before.modules[epoch].state_dict()), (average, known.state_dict())):
        assert found.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
