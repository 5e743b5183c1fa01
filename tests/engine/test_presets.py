"""Presets for convolutional networks: which layer has which rule, by name, bounds and depth, and where they are accepted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Composite
from lrp_prune.attribution import COMPOSITES, AlphaBeta, Flat, Gamma, Rule, Where, ZBox, ZPlus, epsilon_gamma_box
from lrp_prune.engine.composites import composite_of
from lrp_prune.pruning import LRP

PLAIN = Rule()
BOX = "epsilon_gamma_box(-2.0, 3.0)"
PRESETS: dict[str, list[Rule]] = {
    "epsilon_gamma": [Gamma(0.25), Gamma(0.25), PLAIN, PLAIN],
    "epsilon_plus": [ZPlus(), ZPlus(), PLAIN, PLAIN],
    "epsilon_plus_flat": [Flat(), ZPlus(), PLAIN, PLAIN],
    "epsilon_alpha2_beta1": [AlphaBeta(2, 1), AlphaBeta(2, 1), PLAIN, PLAIN],
    BOX: [ZBox(-2, 3), Gamma(0.25), PLAIN, PLAIN],
}
"""The rules of two convolutions and two fully connected layers that run in this order."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10), nn.ReLU(), nn.Linear(10, 4),
    )  # fmt: skip


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3])) for _ in range(2)]


def by_name(rules: list[Rule]) -> Composite:
    layers = zip(("0", "3", "7", "9"), rules, strict=True)
    return Composite("by name", {Where("layer", name=name): rule for name, rule in layers}, base="epsilon")


def relevance_of_input(composite: str | Composite) -> Tensor:
    model, ((x, _), *_) = network(), batches()
    with lrp_prune.attributing(model, composite) as propagation:
        return propagation.relevance(model(x)[:, 1].sum())["input"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_each_layer_the_rule_of_its_depth(preset: str) -> None:
    torch.testing.assert_close(relevance_of_input(preset), relevance_of_input(by_name(PRESETS[preset])))
    others = [relevance_of_input(other) for other in ("epsilon", *PRESETS) if other != preset]
    assert not any(torch.allclose(relevance_of_input(preset), other, rtol=1e-2) for other in others)


@pytest.mark.parametrize("preset", PRESETS)
def test_relevance_of_weights_is_by_the_preset_and_says_so(preset: str, tmp_path: Path) -> None:
    found = lrp_prune.attribute(network(), batches(), composite=preset)
    expected = lrp_prune.attribute(network(), batches(), composite=by_name(PRESETS[preset]))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    found.save(tmp_path / "relevance.safetensors")
    kept = lrp_prune.Relevance.load(tmp_path / "relevance.safetensors").composite
    assert kept == found.composite == preset
    again = lrp_prune.attribute(network(), batches(), composite=kept)
    assert all(torch.equal(again[name], found[name]) for name in found)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_prunes_by_name(preset: str) -> None:
    model = network()
    by_label, by_object = LRP(composite=preset), LRP(composite=composite_of(preset))
    lrp_prune.prune(model, batches(), 0.5, method=by_label)
    other = network()
    lrp_prune.prune(other, batches(), 0.5, method=by_object)
    assert int((model[3].weight == 0).sum()) > 0
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_of_a_network_without_convolutions_the_first_layer_is_fully_connected() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(2, 2, 3)
    x[0, 0, 0] = 0.0
    with lrp_prune.attributing(model, "epsilon_plus_flat") as propagation:
        found = propagation.relevance(model(x)[:, 0].sum())["input"]
    torch.testing.assert_close(found, found.mean((1, 2), keepdim=True).expand(2, 2, 3))
    assert found.any()


@pytest.mark.parametrize("preset", ["epsilon_plus_flat", BOX])
def test_what_the_first_layer_is_handed_reaches_the_input(preset: str) -> None:
    """As much as with the first layer's outputs as the end: pixels that are zero get theirs."""
    model, ((x, _), *_) = network(), batches()
    x = x.clamp(min=0)
    assert (x == 0).float().mean() > 0.3
    with lrp_prune.attributing(model, preset, latent=["0"]) as propagation:
        found = propagation.relevance(model(x)[:, 1].sum())
    torch.testing.assert_close(found["input"].sum(), found["0"].sum())
    assert found["input"][x == 0].abs().sum() > 0.1 * found["input"].abs().sum()


def test_bounds_are_given_in_brackets_one_for_all_or_one_for_each_channel() -> None:
    assert composite_of("epsilon_gamma_box(-2, 3)") == epsilon_gamma_box(-2.0, 3.0)
    assert composite_of(BOX).name == BOX
    of_channels = epsilon_gamma_box((-2, -2, -2), (3, 3, 3))
    assert composite_of(of_channels.name) == of_channels
    torch.testing.assert_close(relevance_of_input(of_channels), relevance_of_input(BOX))


@pytest.mark.parametrize(
    ("composite", "message"),
    [
        ("epsilon_gamma_box", r"needs the smallest and the largest value.*'epsilon_gamma_box\(-2.1, 2.6\)'"),
        ("epsilon_gamma_box(1)", "needs the smallest and the largest value"),
        ("epsilon_gamma_box(low, high)", "needs the smallest and the largest value"),
        ("epsilon_gamma_box('a', 'b')", "low and high must be numbers, or one for each channel, got 'a' and 'b'"),
        ("epsilon_gamma_box(1, 2)", "low must be at most 0"),
        ("epsilon_gama", r"composite must be one of \(.*'epsilon_plus_flat'.*'epsilon_gamma_box\(low, high\)'\)"),
        (3, "composite must be one of .* got 3"),
    ],
)
def test_what_is_no_preset_is_refused_with_what_there_is(composite: Any, message: str) -> None:
    for use in (
        lambda: lrp_prune.attribute(network(), batches(), composite=composite),
        lambda: LRP(composite=composite),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_the_names_of_presets_are_taken() -> None:
    for name in ("epsilon_plus", "epsilon_plus_flat"):
        assert COMPOSITES[name].name == name
        with pytest.raises(ValueError, match="is the name of a preset with other rules"):
            Composite(name, {"convolution": Gamma(0.1)})


def test_layers_are_counted_together_or_by_kind() -> None:
    """The first layer of all is a convolution, so that the first fully connected one is the third of all."""
    first = relevance_of_input(Composite("a", {Where("linear", depth=range(1)): Gamma(0.5)}, base="epsilon"))
    third = relevance_of_input(Composite("b", {Where("layer", depth=range(2, 3)): Gamma(0.5)}, base="epsilon"))
    torch.testing.assert_close(first, third)
    every = relevance_of_input(Composite("c", {"layer": Gamma(0.5)}, base="epsilon"))
    torch.testing.assert_close(every, relevance_of_input(by_name([Gamma(0.5)] * 4)))


def test_a_rule_for_layers_must_be_one_for_each_kind_of_them() -> None:
    with pytest.raises(ValueError, match=r"composite 'mine': identity is a rule for .*, not for 'layer'"):
        Composite("mine", {"layer": "identity"})
    with pytest.raises(ValueError, match=r"composite 'mine' has a rule of its own for 'linear'"):
        lrp_prune.attribute(network(), batches(), composite=Composite("mine", {"layer": lambda call: call.run()}))
