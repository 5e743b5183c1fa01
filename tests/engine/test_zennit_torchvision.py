"""Relevance is that of zennit on torchvision's own residual networks, which it makes ready by a canonizer for them."""

import importlib
import sys
from typing import Any

import pytest
import torch
from torch import nn

import lrp_prune
from tests.engine.test_zennit_normalization import NONE, relevance_of, theirs_of
from tests.support.convolutional import EPS, randomized
from tests.support.torchvision_import import torchvision


def network(block: str) -> nn.Module:
    """Of torchvision, with one block a stage."""
    models = importlib.import_module(f"{torchvision().__name__}.models.resnet")
    model = models.ResNet(getattr(models, block), [1, 1, 1, 1], num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = EPS
    return randomized(model)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["EpsilonPlus", "EpsilonPlusFlat", "EpsilonAlpha2Beta1", "EpsilonGammaBox"])
@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_relevance_is_that_of_zennit_with_its_canonizer(block: str, preset: str, monkeypatch: Any) -> None:
    """In float32, of inputs and of what each stage puts out, to 1e-5 of the largest."""
    model = network(block)
    for name in [name for name in sys.modules if name.partition(".")[0] == "zennit"]:
        monkeypatch.delitem(sys.modules, name)  # it may have been imported without torchvision
    pytest.importorskip("zennit")
    made, resnets = importlib.import_module("zennit.composites"), importlib.import_module("zennit.torchvision")
    bounds = (-3.0, 3.0) if preset == "EpsilonGammaBox" else ()
    canonizers = [resnets.ResNetCanonizer()]
    theirs = getattr(made, preset)(*bounds, epsilon=NONE, stabilizer=NONE, canonizers=canonizers)
    ours = {
        "EpsilonPlus": "epsilon_plus",
        "EpsilonPlusFlat": "epsilon_plus_flat",
        "EpsilonAlpha2Beta1": "epsilon_alpha2_beta1",
        "EpsilonGammaBox": "epsilon_gamma_box(-3.0, 3.0)",
    }[preset]
    x = torch.randn(2, 3, 32, 32).clamp(-2.9, 2.9)
    chosen = torch.zeros(2, 5).scatter_(1, torch.tensor([[1], [3]]), 1.0)
    names = ["maxpool", "layer1", "layer2", "layer3", "layer4"]
    found = relevance_of(model, lrp_prune.engine.composites.composite_of(ours), x, chosen, names)
    found["input"] = found.pop("x")
    for name, expected in theirs_of(theirs, model, x, chosen, names).items():
        assert expected.abs().max() > 1e-4
        assert float((found[name] - expected).abs().max()) <= 1e-5 * float(expected.abs().max()), name
