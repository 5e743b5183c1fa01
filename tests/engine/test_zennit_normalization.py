"""Relevance is that of zennit, of inputs and inside. Both fold batch normalisation, which most networks have, into layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Composite
from lrp_prune.attribution import AlphaBeta, Epsilon, Gamma, Where, WSquare
from tests.support import convolutional

NONE = 1e-12
"""zennit's own stabiliser where ours is left at zero: enough that nothing is divided by zero there."""
NETWORKS = {
    name: getattr(convolutional, name) for name in ("vgg", "vgg_bn", "resnet18", "resnet50", "mobilenet", "convnext")
}
LABELS = [
    "epsilon_plus",
    "epsilon_plus_flat",
    "epsilon_alpha2_beta1",
    "epsilon_gamma_box",
    "gamma",
    "alpha_beta",
    "epsilon",
    "w_square",
]


COMPARED = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardswish,
    nn.GELU,
    nn.MaxPool2d,
    nn.BatchNorm2d,
    nn.BatchNorm1d,
    convolutional.Residual,
)


def pairs(zennit: Any, label: str, has_norms: bool) -> tuple[Composite, Any]:
    """Our composite and zennit's: what is a module of its own in these networks passes relevance on in both."""
    made, rules = zennit.composites, zennit.rules
    passed = [((nn.LayerNorm, convolutional.Scale), rules.Pass())]
    none = {"epsilon": NONE, "stabilizer": NONE, "layer_map": passed}
    none["canonizers"] = [zennit.canonizers.SequentialMergeBatchNorm()]

    def everywhere(ours: Any, theirs: Any) -> tuple[Any, Any]:
        layers = [*passed, *made.layer_map_base(NONE), (zennit.types.Linear, theirs)]
        return {"layer": ours}, made.LayerMapComposite(layers, canonizers=none["canonizers"])

    def preset(ours: str, theirs: Any) -> tuple[Any, Any]:
        return dict(lrp_prune.engine.composites.composite_of(ours).entries), theirs

    def first(ours: Any, theirs: Any) -> tuple[Any, Any]:
        layers = [*passed, *made.layer_map_base(NONE), (zennit.types.Linear, rules.Gamma(0.3, 0.01))]
        special = made.SpecialFirstLayerMapComposite(
            layer_map=layers, first_map=[(zennit.types.Convolution, theirs)], canonizers=none["canonizers"]
        )
        return {Where("layer", depth=range(1)): ours, "layer": Gamma(0.3, 0.01)}, special

    mapping, theirs = {
        "epsilon_plus": lambda: preset("epsilon_plus", made.EpsilonPlus(**none)),
        "epsilon_plus_flat": lambda: preset("epsilon_plus_flat", made.EpsilonPlusFlat(**none)),
        "epsilon_alpha2_beta1": lambda: preset("epsilon_alpha2_beta1", made.EpsilonAlpha2Beta1(**none)),
        "epsilon_gamma_box": lambda: preset("epsilon_gamma_box(-3.0, 3.0)", made.EpsilonGammaBox(-3.0, 3.0, **none)),
        "gamma": lambda: everywhere(Gamma(0.4, 0.01), rules.Gamma(0.4, 0.01)),
        "alpha_beta": lambda: everywhere(AlphaBeta(2, 1, 0.01), rules.AlphaBeta(2, 1, 0.01)),
        "epsilon": lambda: everywhere(Epsilon(0.05), rules.Epsilon(0.05)),
        "w_square": lambda: first(WSquare(0.01), rules.WSquare(0.01, zero_params=["bias"])),
    }[label]()
    norms = {Where("normalization", layer=nn.LayerNorm): "identity"} if has_norms else {}
    return Composite("compared", {**norms, **mapping}, base="epsilon"), theirs


def outputs(model: nn.Module) -> list[str]:
    """The modules whose outputs are compared: activations, blocks, pooling and layers after which no normalisation comes."""
    return [name for name, module in model.named_modules() if isinstance(module, COMPARED)]


def theirs_of(composite: Any, model: nn.Module, x: Tensor, chosen: Tensor, names: list[str]) -> dict[str, Tensor]:
    """zennit's relevance, by name."""
    leaf, kept, modules = x.clone().requires_grad_(), {}, dict(model.named_modules())
    with composite.context(model) as hooked:
        handles = [
            modules[name].register_forward_hook(lambda module, args, output, name=name: kept.__setitem__(name, output))
            for name in names
        ]
        output = hooked(leaf)
        gradients = torch.autograd.grad(output, [leaf, *kept.values()], chosen * output.detach())
        for handle in handles:
            handle.remove()
    return dict(zip(("input", *kept), gradients, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("made", [convolutional.randomized, convolutional.trained], ids=["random", "trained"])
def test_relevance_is_that_of_zennit(
    zennit: Any, made: Callable[[nn.Module], nn.Module], network: str, label: str
) -> None:
    """In float64 to 1e-7 of the largest, which is what zennit's stabilisers leave; in float32 to 1e-5 of what zennit finds in
    float32, or where its own rounding is larger than that, in float64."""
    torch.manual_seed(0)
    model = made(NETWORKS[network](zennit.layer.Sum))
    ours, theirs = pairs(zennit, label, has_norms=network == "convnext")
    x = torch.randn(3, 3, 16, 16).clamp(-2.9, 2.9)
    x[:, :, 4:7, 4:7] = 0.0
    chosen = torch.zeros(3, 5).scatter_(1, torch.tensor([[0], [3], [4]]), 1.0)
    names = outputs(model)
    single, double = (
        relevance_of(model.to(dtype), ours, x.to(dtype), chosen, names) for dtype in (torch.float32, torch.float64)
    )
    rounded = theirs_of(theirs, model.float(), x, chosen, names)
    for name, expected in theirs_of(theirs, model.double(), x.double(), chosen.double(), names).items():
        largest = float(expected.abs().max())
        assert largest > 1e-4
        assert float((double[name] - expected).abs().max()) <= 1e-7 * largest, name
        assert min(float((single[name] - other).abs().max()) for other in (rounded[name], expected)) <= 1e-5 * largest


def relevance_of(
    model: nn.Module, composite: Composite, x: Tensor, chosen: Tensor, names: list[str]
) -> dict[str, Tensor]:
    """Our relevance, by name; the model is as before."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with lrp_prune.attributing(model, composite, latent=names) as propagation:
        found = propagation.relevance((model(x) * chosen).sum())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return found
