"""Masks by chance, and a copy of a model that is pruned and recalibrated."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import lrp_prune
from lrp_prune import Masks
from lrp_prune.pruning import scorer
from lrp_prune.pruning.recalibration import Recalibration
from tests.support.recurrent_layers import LastStep


def masks_of(model: nn.Module, sparsity: float, seed: int = 0) -> Masks:
    return lrp_prune.select(scorer(lrp_prune.Random(seed), model).compute(), sparsity, scope="layer")


def applied(model: nn.Module, masks: Masks, recalibration: Recalibration) -> nn.Module:
    sparse = copy.deepcopy(model)
    masks.apply_(sparse)
    recalibration.apply_(sparse)
    return sparse


MODELS: dict[str, Callable[[], tuple[nn.Module, list[Any]]]] = {
    "mlp": lambda: (nn.Sequential(nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 5)), [(torch.randn(64, 12),) for _ in range(4)]),
    "without biases": lambda: (
        nn.Sequential(nn.Linear(12, 40, bias=False), nn.ReLU(), nn.Linear(40, 5, bias=False)),
        [(torch.randn(64, 12),) for _ in range(4)],
    ),
    "convolutions": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)),
        [(torch.randn(32, 3, 6, 6),) for _ in range(4)],
    ),
    "transposed": lambda: (
        nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)),
        [(torch.randn(32, 4, 3, 3),) for _ in range(4)],
    ),
    "attention": lambda: (
        nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True), [(torch.randn(16, 5, 16),) for _ in range(4)],
    ),
    "lstm": lambda: (LastStep(nn.LSTM(6, 12, batch_first=True), nn.Linear(12, 3)), [(torch.randn(32, 7, 6),) for _ in range(4)]),
}  # fmt: skip
