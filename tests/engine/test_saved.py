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
from lrp_prune.pruning.choices import Choices
from lrp_prune.pruning.pairs import PrunedUses
from lrp_prune.pruning.passes import outputs_of
from lrp_prune.pruning.products import ComputedUses
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


class Energy(nn.Module):
    """An energy of positions, and its force: a gradient that the forward takes itself, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.hidden, self.head = way, nn.Linear(3, 16), nn.Linear(16, 1)

    def energy(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x).tanh()).sum(1)

    @torch.enable_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.way == "func":
            return self.energy(x), torch.func.grad(lambda x: self.energy(x).sum())(x)
        if self.way == "jacobian":
            found = torch.autograd.functional.jacobian(lambda x: self.energy(x).sum(), x, create_graph=True)
            return self.energy(x), found
        if self.way == "backward":
            x = x.detach()
            x.requires_grad = True
        elif self.way == "method":
            x = x.clone().requires_grad_()
        elif self.way == "asked" and not x.requires_grad:
            x.requires_grad_()
        elif self.way == "made":
            x = x + torch.zeros(3, device=x.device, requires_grad=True)
        energy = self.energy(x)
        if self.way == "backward":
            energy.sum().backward(retain_graph=True)
            return energy, x.grad
        return energy, torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


WAYS = ["method", "asked", "given", "made", "backward", "jacobian", "func"]


def positions(way: str) -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(8, 3).requires_grad_(way == "given"),) for _ in range(4)]


def whole(model: nn.Module, batch: Any) -> Any:
    return model(*batch)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "magnitude", "recalibrate": False},
        {"method": "magnitude"},
        {"method": "wanda", "scope": "layer"},
        {"method": "magnitude", "compensation": "exact"},
        {"method": "activation", "granularity": "neuron"},
    ],
    ids=str,
)
@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_takes_gradients_in_its_forward_is_pruned(way: str, options: dict[str, Any]) -> None:
    model = Energy(way)
    assert lrp_prune.prune(model, positions(way), 0.5, **options, progress=False).sparsity == 0.5


@pytest.mark.parametrize("way", WAYS)
def test_gradients_within_such_a_forward_are_those_of_the_model(way: str) -> None:
    batch = positions(way)[0]
    for uses in (WeightUses(), ComputedUses()):
        found = outputs_of(Energy(way), batch, uses, whole, Choices())
        torch.testing.assert_close(found, [entry.detach() for entry in Energy(way)(batch[0].clone())])


def test_such_gradients_know_what_recalibration_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, judged = Energy("method"), positions("method"), {}

    def noting(module: nn.Module, batch: Any, uses: WeightUses, *rest: Any) -> list[Tensor]:
        found = outputs_of(module, batch, uses, *rest)
        if isinstance(uses, PrunedUses):
            judged[uses._strength] = found
        return found

    monkeypatch.setattr("lrp_prune.pruning.fitting.outputs_of", noting)
    masks = lrp_prune.prune(Energy("method"), batches, 0.5, "magnitude", recalibrate=False, progress=False)
    found = recalibrate(model, masks, batches, whole)
    masks.apply_(model)
    found.apply_(model)
    assert found.strength and found.scales
    torch.testing.assert_close(judged[found.strength], [entry.detach() for entry in model(*batches[-1])])
