"""Relevance of inputs is that of zennit (Anders et al. 2021, arXiv 2106.13200), written independently, on small networks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Composite
from lrp_prune.attribution import AlphaBeta, Epsilon, Flat, Gamma, Where, WSquare, ZBox, ZPlus
from tests.support.convolutional import vgg

NONE = 1e-12
"""zennit's own stabiliser where ours is left at zero, and in pooling: enough that nothing is divided by zero there."""


class Residual(nn.Module):
    """A block whose sum is a module, as zennit needs it."""

    def __init__(self, channels: int, out: int, stride: int, make_sum: type[nn.Module]) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, out, 3, stride, 1)
        self.two = nn.Conv2d(out, out, 3, 1, 1)
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(channels, out, 1, stride)
        self.relu, self.last, self.sum = nn.ReLU(), nn.ReLU(), make_sum()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.two(self.relu(self.one(x)))
        return self.last(self.sum(torch.stack([self.short(x), branch], -1)))


def resnet(make_sum: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, 2, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        Residual(8, 8, 1, make_sum), Residual(8, 12, 2, make_sum), Residual(12, 12, 1, make_sum),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


def pairs(zennit: Any) -> dict[str, tuple[str | Composite, Any]]:
    """A label -> our composite, and zennit's."""
    made, rules = zennit.composites, zennit.rules
    convolution, linear = zennit.types.Convolution, nn.Linear
    none = {"epsilon": NONE, "stabilizer": NONE}

    def layers(of_convolutions: Any, of_linear: Any) -> Any:
        return [*made.layer_map_base(NONE), (convolution, of_convolutions), (linear, of_linear)]

    def first(ours: Any, theirs: Any) -> tuple[Composite, Any]:
        """A rule for the first layer, over z+ and epsilon."""
        mapping = {Where("layer", depth=range(1)): ours, "convolution": ZPlus(0.01), "linear": Epsilon(0.1)}
        over = layers(rules.ZPlus(0.01), rules.Epsilon(0.1))
        special = made.SpecialFirstLayerMapComposite(layer_map=over, first_map=[(convolution, theirs)])
        return Composite("first", mapping, base="epsilon"), special

    def everywhere(ours: Any, theirs: Any) -> tuple[Composite, Any]:
        return Composite("all", {"layer": ours}, base="epsilon"), made.LayerMapComposite(layers(theirs, theirs))

    channels = rules.ZBox(_per_channel(-3, -4, -5), _per_channel(5, 4, 3), stabilizer=0.01)
    return {
        "epsilon_plus": ("epsilon_plus", made.EpsilonPlus(**none)),
        "epsilon_plus_flat": ("epsilon_plus_flat", made.EpsilonPlusFlat(**none)),
        "epsilon_alpha2_beta1": ("epsilon_alpha2_beta1", made.EpsilonAlpha2Beta1(**none)),
        "epsilon_gamma_box": ("epsilon_gamma_box(-3.0, 3.0)", made.EpsilonGammaBox(-3.0, 3.0, **none)),
        "box of channels": first(ZBox((-3, -4, -5), (5, 4, 3), 0.01), channels),
        "w_square": first(WSquare(0.01), rules.WSquare(0.01, zero_params=["bias"])),
        "flat": first(Flat(0.5), rules.Flat(0.5)),
        "epsilon": everywhere(Epsilon(0.05), rules.Epsilon(0.05)),
        "gamma": everywhere(Gamma(0.4, 0.01), rules.Gamma(0.4, 0.01)),
        "alpha_beta": everywhere(AlphaBeta(3, 2, 0.01), rules.AlphaBeta(3, 2, 0.01)),
    }


LABELS = [
    "epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1", "epsilon_gamma_box", "box of channels", "w_square", "flat",
    "epsilon", "gamma", "alpha_beta",
]  # fmt: skip


def _per_channel(*bounds: float) -> Tensor:
    return torch.tensor(bounds)[None, :, None, None].expand(3, 3, 16, 16)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("make", [vgg, resnet], ids=["vgg", "resnet"])
def test_relevance_of_inputs_is_that_of_zennit(zennit: Any, make: Any, label: str) -> None:
    torch.manual_seed(0)
    model = make(zennit.layer.Sum).eval()
    for parameter in model.parameters():
        nn.init.kaiming_normal_(parameter) if parameter.dim() > 1 else nn.init.normal_(parameter, std=0.1)
    ours, theirs = pairs(zennit)[label]
    x = torch.randn(3, 3, 16, 16).clamp(-2.9, 2.9)
    x[:, :, 4:7, 4:7] = 0.0
    chosen = torch.zeros(3, 5).scatter_(1, torch.tensor([[0], [3], [4]]), 1.0)
    with lrp_prune.attributing(model, ours) as propagation:
        found = propagation.relevance((model(x) * chosen).sum())["input"]
    leaf = x.clone().requires_grad_()
    with theirs.context(model) as hooked:
        output = hooked(leaf)
        (expected,) = torch.autograd.grad(output, leaf, chosen * output.detach())
    assert expected.abs().max() > 1e-3
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
