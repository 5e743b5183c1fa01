"""After every kind of mask each layer is its closed form: of single weights, N:M, neurons, heads, filters, experts."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.pruning import LeastSquares, Masks
from lrp_prune.pruning.compensation import compensate_
from tests.support.compensation import check_closed_form
from tests.support.small_models import batch_for, build

WAY = LeastSquares(damping=0.05, steps=1000, tolerance=1e-12)
WEIGHTS: list[dict[str, Any]] = [{"scope": scope} for scope in ("global", "layer", "row", "column", "2:4", "1:4")]


def pruned(model: nn.Module, batches: list[Any], **options: Any) -> tuple[nn.Module, nn.Module, Masks]:
    """The dense model, the pruned one, and its masks."""
    dense = copy.deepcopy(model)
    sparsity = 0.75 if options.get("scope") == "1:4" else 0.5
    masks = lrp_prune.prune(model, batches, sparsity, "magnitude", compensation=WAY, progress=False, **options)
    return dense, model, masks


def matrices(model: nn.Module, masks: Masks) -> set[str]:
    """Names of what has to be compensated."""
    return {name for name in masks if masks.pruned_in(name) and model.get_parameter(name).dim() > 1}


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 16, bias=False), nn.Tanh(), nn.Linear(16, 4)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("options", [*WEIGHTS, {"granularity": "neuron"}], ids=str)
def test_linear_layers(options: dict[str, Any]) -> None:
    batches = [(torch.randn(60, 8).double(), torch.randint(4, (60,))) for _ in range(2)]
    dense, model, masks = pruned(perceptron(), batches, **options)
    x = torch.cat([inputs for inputs, _ in batches])
    names = check_closed_form(dense, model, masks, lambda model: model(x), WAY, 1e-6)
    assert names == {f"{index}.weight" for index in (0, 2, 4)}


class Convolutional(nn.Sequential):
    """With groups, one channel each among them, strides, paddings and dilations."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 12, 3, groups=4, stride=2, padding=2, bias=False), nn.ReLU(),
            nn.Conv2d(12, 12, 2, groups=12, dilation=2), nn.ReLU(),
            nn.Conv2d(12, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4),
        )  # fmt: skip


@pytest.mark.parametrize("options", [{"scope": "layer"}, {"scope": "row"}, {"granularity": "neuron"}], ids=str)
def test_convolutions(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Convolutional().double().eval()
    model[1].running_mean.normal_()
    batches = [(torch.randn(12, 4, 9, 9).double(), torch.randint(4, (12,))) for _ in range(2)]
    dense, model, masks = pruned(model, batches, **options)
    x = torch.cat([inputs for inputs, _ in batches])
    names = check_closed_form(dense, model, masks, lambda model: model(x), WAY, 1e-6)
    assert names == matrices(model, masks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
@pytest.mark.parametrize("options", [{"scope": "2:4"}, {"granularity": "neuron"}, {"granularity": "head"}], ids=str)
def test_transformers(name: str, options: dict[str, Any]) -> None:
    """Fused projections, of which one part may be a head's, grouped queries, and projections back from heads."""
    torch.manual_seed(0)
    batch = batch_for(name, 24, 12) if name == "vit" else {"input_ids": torch.randint(2, 50, (24, 12))}
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    own = {"exclude": ["vit.embeddings*"]} if name == "vit" and "scope" in options else {}
    dense, model, masks = pruned(build(name).double(), [batch], **options, **own)
    names = check_closed_form(dense, model, masks, lambda model: model(**batch), WAY, 1e-6)
    assert names == matrices(model, masks) and len(names) >= 2


class Experts(nn.Module):
    """A stack of experts, each of which gets a batch of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = (
            nn.Linear(6, 8),
            nn.Parameter(torch.randn(3, 8, 10)),
            nn.Parameter(torch.randn(3, 10, 4)),
        )

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x).reshape(3, -1, 8)
        return x, torch.bmm(x, self.up).relu()

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.inputs(x)[1], self.down).flatten(0, 1)


def test_experts_of_a_stack() -> None:
    torch.manual_seed(0)
    model, x = Experts().double(), torch.randn(90, 6).double()
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (3, 8, 10), "down": (3, 10, 4)}
    masks = Masks({name: torch.rand(shape, generator=generator) > 0.5 for name, shape in shapes.items()})
    dense = copy.deepcopy(model)
    found = compensate_(model, masks, [x], WAY)
    assert set(found.errors) == {"up", "down"} and not found.left_out
    with torch.no_grad():
        ours, theirs = model.inputs(x), dense.inputs(x)
    for name, own, other in zip(("up", "down"), ours, theirs, strict=True):
        for expert in range(3):
            rows, before = own[expert], dense.get_parameter(name)[expert].detach()
            target = ((1 - WAY.dense) * rows + WAY.dense * other[expert]) @ before
            delta = WAY.damping * float(rows.square().sum(0).mean())
            for out in range(before.shape[1]):
                support = masks[name][expert][:, out]
                system = (rows.T @ rows + delta * torch.eye(rows.shape[1]).double())[support][:, support]
                right = (rows.T @ target[:, out] + delta * before[:, out])[support]
                expected = torch.zeros(len(support)).double()
                expected[support] = torch.linalg.solve(system, right)
                torch.testing.assert_close(
                    model.get_parameter(name)[expert, :, out].detach(), expected, rtol=1e-6, atol=1e-8
                )
