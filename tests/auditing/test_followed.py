"""Audits follow modules however they are called, whatever they return, and whatever their biases are called."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import lrp_prune


class Fed(nn.Module):
    """A module that is called with a bare parameter, and what it gives added to activations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.task, self.mlp = nn.Parameter(torch.randn(3, 8)), nn.Linear(8, 8, bias=False)
        self.first, self.last = nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x)[:, None] + self.mlp(self.task)).relu().sum(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(spectral_norm(nn.Linear(4, 8, bias=False)), nn.ReLU(), nn.Linear(8, 2, bias=False)),
        lambda: nn.Sequential(weight_norm(nn.Linear(4, 8, bias=False)), nn.ReLU(), nn.Linear(8, 2, bias=False)),
        Fed,
    ],
    ids=["spectral_norm", "weight_norm", "parameter"],
)
def test_modules_that_are_called_with_a_parameter_are_followed(make: Callable[[], nn.Module]) -> None:
    report = lrp_prune.audit(make(), torch.randn(8, 4), composite="epsilon")
    assert report.lost is not None and report.lost < 1e-4 and not report.causes


def test_modules_that_return_an_object_are_followed() -> None:
    class Wrapped(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(hidden=super().forward(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = Wrapped(4, 8), nn.Linear(8, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).hidden.relu())

    report = lrp_prune.audit(Model(), torch.randn(8, 4), target=1)
    assert [passage.name for passage in report.passages] == ["", "first", "last"] and set(report.causes) == {"first"}


class HandNamed(nn.Module):
    """Biases by any name: given to a function, added, and made of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w1, self.b1 = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8))
        self.mixing, self.shift, self.task = (nn.Parameter(torch.randn(*shape)) for shape in ((8, 8), (8,), (8,)))
        self.last = nn.Linear(8, 2, bias=False)

    def forward(self, x: Tensor, way: int) -> Tensor:
        if way == 0:
            return self.last(F.linear(x, self.w1, self.b1).relu())
        hidden = F.linear(x, self.w1).relu()
        added = self.shift if way == 1 else self.task.exp()
        return self.last((hidden + added).relu() if way < 3 else torch.addmm(self.shift, hidden, self.mixing))


@pytest.mark.parametrize("way", range(4))
def test_what_is_used_as_a_bias_is_one_whatever_its_name(way: int) -> None:
    report = lrp_prune.audit(HandNamed(), {"x": torch.randn(8, 4), "way": way}, target=1)
    assert report.causes == {"": "bias"} and not [
        remark for remark in report.problems if remark.about == "conservation"
    ]


def test_modules_that_return_several_by_name_are_followed() -> None:
    class Parts(NamedTuple):
        half: Tensor
        other: Tensor

    class Split(nn.Module):
        def forward(self, x: Tensor) -> Parts:
            return Parts(x / 2, x / 2)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.split, self.head = Split(), nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            parts = self.split(x)
            return self.head(parts.half + parts.other)

    report = lrp_prune.audit(Named(), torch.randn(8, 4), target=1)
    assert "split" in {passage.name for passage in report.passages} and not report.causes
