"""A small model, its data, and what they are judged by."""

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("optuna")

RATES = (0.0, 0.2, 0.4, 0.6)


@pytest.fixture
def model() -> nn.Module:
    return made_model()


@pytest.fixture
def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return made_data()


def made_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)).train()


def made_data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(16, 6, generator=generator) for _ in range(10)]
    return [(each, each[:, :3].argmax(1)) for each in inputs]


def accuracy(model: nn.Module, batches: Any) -> float:
    """At the top of a module, so that it can be sent to a process."""
    with torch.no_grad():
        right = sum(int((model(inputs).argmax(1) == labels).sum()) for inputs, labels in batches)
    return right / sum(len(labels) for _, labels in batches)


def state(model: nn.Module) -> list[torch.Tensor]:
    """All that may not change."""
    modes = torch.tensor([module.training for module in model.modules()])
    assert all(parameter.grad is None for parameter in model.parameters())
    return [modes, torch.get_rng_state(), *(value.clone() for value in model.state_dict().values())]


def told(found: Any) -> list[Any]:
    """What was tried, and what came of it."""
    return [(trial.number, trial.chosen, trial.value, trial.curve, trial.why) for trial in found.tried]
