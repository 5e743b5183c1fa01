"""A forward that nothing goes back through keeps no activations; graphs within it keep theirs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.engine.composites import composite_of
from lrp_prune.engine.propagation import propagating
from lrp_prune.engine.uses import WeightUses
from lrp_prune.planning.live import Live
from lrp_prune.pruning import scorer
from lrp_prune.pruning.recalibration import recalibrate

WIDTH, ROWS = 16, 256
ACTIVATIONS = 4 * ROWS * WIDTH  # bytes of one layer's


def deep(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(entry for _ in range(layers) for entry in (nn.Linear(WIDTH, WIDTH), nn.GELU())))


def peak(layers: int, backward: bool) -> int:
    model, x = deep(layers), torch.randn(ROWS, WIDTH)
    with Live() as live, propagating(model, composite_of("gradient"), None, "ignore", WeightUses(), backward=backward):
        model(x)
    return live.peak


def test_no_activations_are_kept() -> None:
    assert peak(24, backward=False) == peak(6, backward=False)
    assert peak(24, backward=True) - peak(6, backward=True) >= 18 * ACTIVATIONS


@pytest.mark.parametrize("method", ["wanda", "lrp"])
def test_methods_that_only_run_forwards_take_as_much_of_deep_models(method: str) -> None:
    def collected(layers: int) -> int:
        model, batch = deep(layers), (torch.randn(ROWS, WIDTH), torch.arange(ROWS) % WIDTH)
        with Live() as live:
            scores = scorer(method, model)
            scores.update(batch)
        return live.peak

    grown = collected(24) - collected(6)
    assert grown < 2 * ACTIVATIONS if method == "wanda" else grown > 10 * ACTIVATIONS


def test_recalibration_keeps_no_activations_beside_outputs() -> None:
    def recalibrated(layers: int) -> int:
        model, batches = deep(layers), [torch.randn(ROWS, WIDTH)]
        masks = lrp_prune.prune(deep(layers), batches, 0.5, "random", recalibrate=False, progress=False)
        with Live() as live:
            recalibrate(model, masks, batches, "", progress=False)
        return live.peak

    assert recalibrated(24) - recalibrated(6) < 1.3 * 18 * ACTIVATIONS  # of dense outputs, one for each layer


class Gated(nn.Module):
    """A recurrent layer, whose gates rules are asked about in the forward, and a product without a form of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.head = nn.LSTM(6, 8, batch_first=True), nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("oi,bi->bo", self.head, self.steps(x)[0][:, -1])


@pytest.mark.parametrize("composite", ["cp_lrp", "attnlrp", "epsilon"])
def test_graphs_within_such_a_forward_keep_what_they_save(composite: str) -> None:
    torch.manual_seed(0)
    model, batch = Gated(), (torch.randn(5, 4, 6), torch.arange(5) % 3)
    options: dict[str, Any] = {"statistic": "input_norm", "composite": composite, "include": ["*"]}
    found = lrp_prune.attribute(model, [batch], **options)
    assert "head" in found and bool((found["head"] > 0).any())
