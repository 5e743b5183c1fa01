"""Layers that use another tensor than the parameter they have."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Using(nn.Linear):
    """A linear layer that computes its weight in its forward."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(8, 6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.function(self.weight), self.bias)


class Masked(nn.Module):
    """A parametrization by a fixed mask."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.arange(48).reshape(6, 8) % 3 > 0).float())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def small_model(first: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(first or nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()


def sum_of_outputs(model: nn.Module, batch: Tensor) -> Tensor:
    value: Tensor = model(batch).square().sum()
    return value
