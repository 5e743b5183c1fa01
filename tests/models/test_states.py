"""Running a model leaves no trace: modes and all generators of random numbers."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.models.states import undisturbed


class Drawing(nn.Module):
    """Draws from all three in each forward, in evaluation mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        factor = 1 + 1e-3 * (random.random() + np.random.rand() + float(torch.rand(())))
        return self.layer(x) * factor


def drawn() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), float(torch.rand(()))


@pytest.mark.parametrize("method", ["lrp", "wanda", "gradient"])
def test_no_generator_has_moved(method: str) -> None:
    torch.manual_seed(0)
    batch, model = (torch.randn(6, 3), torch.randint(2, (6,))), Drawing()
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(3)
    expected = drawn()
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(3)
    lrp_prune.prune(model, [batch], 0.5, method=method)
    assert drawn() == expected


def test_they_come_back_after_an_error() -> None:
    model = Drawing().train()
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    with pytest.raises(RuntimeError), undisturbed(model):
        drawn()
        raise RuntimeError
    assert (random.random(), np.random.rand()) == expected and model.training
