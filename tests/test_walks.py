"""Going through modules gives what torch's own ways give."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lrp_prune.walks import modules_of, named_modules_of, named_parameters_of
from tests.support.small_models import build


def shared() -> nn.Module:
    """A layer that is held in two places, a weight that is tied, and an attribute that is set to none."""
    layer = nn.Linear(3, 3)
    model = nn.Sequential(nn.Sequential(nn.ReLU(), layer), nn.ModuleDict({"again": layer, "tied": nn.Linear(3, 3)}))
    model[1]["tied"].weight = layer.weight
    model[0].register_module("nothing", None)
    model[0].register_parameter("none", None)
    return model


class Renamed(nn.Sequential):
    """Goes through its modules in a way of its own, as PEFT's layer of ``nn.MultiheadAttention`` does."""

    def named_modules(
        self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        self.weight = nn.Parameter(torch.ones(1))
        yield from super().named_modules(memo, prefix, remove_duplicate)


def overriding() -> nn.Module:
    inner = nn.Linear(2, 2)
    return nn.Sequential(inner, Renamed(inner, nn.ReLU()), nn.Linear(2, 2))


class OwnParameters(nn.Linear):
    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return (("mine." + name, parameter) for name, parameter in super().named_parameters(*args, **kwargs))


MODELS = [shared, overriding, lambda: OwnParameters(2, 2), lambda: build("llama"), lambda: build("t5")]


@pytest.mark.parametrize("make", MODELS)
def test_each_module_comes_once_in_the_order_of_torch(make: Any) -> None:
    model = make()
    expected = list(model.named_modules())
    assert list(named_modules_of(model)) == expected
    assert modules_of(model) == [module for _, module in expected]


@pytest.mark.parametrize("make", MODELS)
def test_each_path_may_be_asked_for(make: Any) -> None:
    model = make()
    assert list(named_modules_of(model, each_path=True)) == list(model.named_modules(remove_duplicate=False))


@pytest.mark.parametrize("make", MODELS)
def test_each_parameter_comes_once_under_its_first_name(make: Any) -> None:
    model = make()
    found = list(named_parameters_of(model))
    expected = dict(model.named_parameters())
    assert [name for name, _ in found] == list(expected)
    assert make is overriding or all(parameter is expected[name] for name, parameter in found)  # which makes new ones
