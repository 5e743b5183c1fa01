"""Relevance with batch normalisations folded into their neighbours."""

from typing import Any

from torch import Tensor, nn

import lrp_prune
from lrp_prune import Composite
from lrp_prune.attribution import Gamma

EXACT = {"rtol": 1e-9, "atol": 1e-10}
GAMMA = Composite("folded", {"layer": Gamma(0.4)}, base="epsilon")


def relevance(model: nn.Module, x: Tensor, composite: str | Composite = GAMMA, **given: Any) -> dict[str, Tensor]:
    with lrp_prune.attributing(model, composite, **given) as propagation:
        return propagation.relevance(target(model, x))


def target(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).flatten(1)[:, ::2].sum()


def scaling(norm: Any) -> tuple[Tensor, Tensor]:
    scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias.detach() - norm.running_mean * scale


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip
