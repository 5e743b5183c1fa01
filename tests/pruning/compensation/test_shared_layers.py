"""Layers that are used several times, by several blocks, or read the same as another at some of their uses."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lrp_prune.pruning.compensation import compensate_
from tests.support.compensation import EXACT, half


class Unequal(nn.Module):
    """Two layers read the same once, and one of them something else besides."""

    def __init__(self, again: str) -> None:
        super().__init__()
        self.a, self.b, self.again = nn.Linear(8, 8), nn.Linear(8, 8), again

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.a(x), self.b(x)
        return k + getattr(self, self.again)(4 * torch.relu(q) + 1)


class Sometimes(nn.Module):
    """Two layers read the same in one batch, and not in the next."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.a(x)
        return q + (self.b(x) if len(x) > 40 else self.b(3 * q.relu() + 1))


def check_regression(dense: nn.Module, model: nn.Module, name: str, batches: list[Tensor], masks: Tensor) -> None:
    """A layer is the ridge regression on what it gets at all of its uses; half of its targets are of what the dense one gets."""
    layer, before = model.get_submodule(name), dense.get_submodule(name)
    x, wanted = (inputs_of(entry, entry.get_submodule(name), batches) for entry in (model, dense))
    ones, theirs = (torch.cat([entry, torch.ones(len(entry), 1).to(entry)], dim=1) for entry in (x, wanted))
    damping = EXACT.damping * float(x.square().sum(0).mean())
    mixed = ones.lerp(theirs, EXACT.dense)
    start = torch.cat([before.weight, before.bias[:, None]], dim=1).detach()  # type: ignore[list-item, index]
    gram = ones.T @ ones + damping * torch.eye(ones.shape[1]).to(x)
    for row, own in enumerate(masks):
        at = torch.cat([own, torch.tensor([True])])
        cross = start[row] @ (mixed.T @ ones) + damping * start[row]
        expected = torch.linalg.solve(gram[at][:, at], cross[at])
        found = torch.cat([layer.weight[row, own], layer.bias[row : row + 1]]).detach()  # type: ignore[index]
        assert torch.allclose(found, expected, atol=1e-6), name


def inputs_of(model: nn.Module, layer: nn.Module, batches: list[Tensor]) -> Tensor:
    """What a layer gets, at all of its uses."""
    found = list[Tensor]()
    handle = layer.register_forward_pre_hook(lambda _, given: found.append(given[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize(
    "make", [lambda: Unequal("a"), lambda: Unequal("b"), Sometimes], ids=["first", "second", "sometimes"]
)
def test_a_layer_has_the_least_squares_of_all_of_its_uses(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(make(), make())).double()
    batches = [torch.randn(48, 8).double(), torch.randn(32, 8).double()]
    names = [name for name, weight in model.named_parameters() if weight.dim() > 1]
    masks, dense = half(model, names), copy.deepcopy(model)
    compensate_(model, masks, batches, EXACT)
    for name in ("0.0.b", "0.1.b"):
        check_regression(dense, model, name, batches, masks[f"{name}.weight"])


class Turned(nn.Module):
    """Rolls what it gets before a layer that others have as well."""

    def __init__(self, shared: nn.Linear, number: int) -> None:
        super().__init__()
        self.shared, self.own, self.number = shared, nn.Linear(8, 8), number

    def forward(self, x: Tensor) -> Tensor:
        return self.own(torch.relu(self.shared(torch.roll(x, self.number, -1))))


@pytest.mark.parametrize("tied", ["layer", "weight"])
def test_a_layer_of_several_blocks_is_masked_by_name_and_its_dense_values_make_the_targets(tied: str) -> None:
    torch.manual_seed(0)
    shared, other = nn.Linear(8, 8), nn.Linear(8, 8)
    other.weight = shared.weight
    model = nn.Sequential(Turned(shared, 0), Turned(shared if tied == "layer" else other, 1)).double()
    batches, dense = [torch.randn(64, 8).double() for _ in range(2)], copy.deepcopy(model)
    masks = half(model, ["0.shared.weight", "0.own.weight", "1.own.weight"])
    found = compensate_(model, masks, batches, EXACT)
    assert found.left_out == {"0.shared.weight": "is used by something else as well"} and len(found.errors) == 2
    kept = masks["0.shared.weight"]
    assert torch.equal(model[0].shared.weight, dense[0].shared.weight * kept)
    check_regression(dense, model, "1.own", batches, masks["1.own.weight"])
