"""Small models for compensation, and masks of half of their weights."""

from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.pruning import Masks


def mlp(seed: int = 0) -> tuple[nn.Sequential, list[Any]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    return model, [(torch.randn(64, 8).double(), torch.randint(3, (64,))) for _ in range(3)]


def half(model: nn.Module, names: list[str], seed: int = 0) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    return Masks({name: torch.rand(parameters[name].shape, generator=generator) > 0.5 for name in names})


class Twice(nn.Module):
    """The first layer runs twice, and is in no stage."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def before(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.before(x)).relu())
