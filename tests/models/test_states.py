"""Running a model leaves no trace: modes and all generators of random numbers."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import lrp_prune
from lrp_prune.models.states import undisturbed, unlogged


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


class Noting(LightningModule):
    """Notes what it logs; holds another that does."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.noted = inner or nn.Linear(3, 2), []

    def log(self, name: str, value: object, *args: object, **kwargs: object) -> None:
        self.noted.append(name)

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer(x)
        self.log("mean", output.mean())
        self.log_dict({"largest": output.max()})
        return output


def test_nothing_is_logged_inside_and_all_of_it_afterwards() -> None:
    model = Noting(Noting())
    before, x = set(vars(model)), torch.ones(1, 3)
    with pytest.raises(RuntimeError), undisturbed(model):
        with unlogged(model):
            model(x)
        model(x)
        assert not model.noted and not model.layer.noted
        raise RuntimeError
    assert set(vars(model)) == before
    model(x)
    assert model.noted == model.layer.noted == ["mean", "largest"]


def test_a_log_of_the_instance_comes_back() -> None:
    model = Noting()
    model.log = own = lambda *_, **__: None
    lrp_prune.prune(model, [(torch.randn(6, 3), torch.randint(2, (6,)))], 0.5)
    assert model.log is own and not model.noted
