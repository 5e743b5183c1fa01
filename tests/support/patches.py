"""Patches of a small Llama and of the correction tests' LightningModule, and what they leave."""

from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.correction import Patch
from lrp_prune.wrapper.module import CorrectedModule

UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
POSITIONS, LAST = torch.tensor([0, 5, 9]), "net.4.weight"
"""Of the module that the fixture `everything` makes."""


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def some_patch(model: nn.Module, seed: int = 0, **provenance: Any) -> Patch:
    generator = torch.Generator().manual_seed(seed)
    positions = {
        name: torch.randperm(model.get_parameter(name).numel(), generator=generator)[:9] for name in (UP, DOWN)
    }
    return Patch.from_positions(model, positions, **provenance)


def patch_of(module: nn.Module, positions: Tensor = POSITIONS) -> Patch:
    return Patch.from_positions(module, {LAST: positions})


def wrapped(module: nn.Module, **options: Any) -> CorrectedModule:
    return CorrectedModule(module, {"example": patch_of(module)}, **options)


def entries(module: nn.Module, positions: Tensor = POSITIONS) -> Tensor:
    return module.net[4].weight.detach().view(-1)[positions].clone()


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}
