"""Trainings that leave weights as they are, so that runs on any number of processes can be compared."""

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.robustness.resumable_training import Classifier


class Still(Classifier):
    """Does not train, so that runs on any number of processes can be compared."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Uneven(Still):
    """Does not train; biases, and sizes that two processes cannot share equally; a batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 13),
            torch.nn.ReLU(),
            torch.nn.Linear(13, 11),
            torch.nn.BatchNorm1d(11, momentum=0.0),
            torch.nn.Linear(11, 4),
        )

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            from torch.distributed.fsdp import FSDPModule, fully_shard

            if not isinstance(self.net, FSDPModule):
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def loader(samples: int = 48, seed: int = 1) -> DataLoader[Any]:
    inputs = torch.randn(samples, 8, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(inputs, (inputs[:, :4] + 0.5 * inputs[:, 4:]).argmax(dim=1)), 4)
