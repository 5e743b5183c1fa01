"""A tiny model, masks for it, and its training by any optimizer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Weights = Iterable[nn.Parameter]


class Drifting(Optimizer):
    """An optimizer as users write them: its update does not vanish with the gradient."""

    def __init__(self, params: Weights) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                moment = self.state[parameter].setdefault("drift", torch.zeros_like(parameter))
                moment.add_(0.1)
                parameter.add_(moment)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def make_masks(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(parameter.shape, generator=generator) > 0.5
        for name, parameter in model.named_parameters()
        if name.endswith("weight")
    }


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return model(torch.randn(16, 6, generator=generator)).square().sum()


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int]) -> None:
    for step in steps:

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        optimizer.step(closure)


def pruned_values(model: nn.Module, masks: dict[str, Tensor]) -> Tensor:
    return torch.cat([model.get_parameter(name)[~mask] for name, mask in masks.items()])
