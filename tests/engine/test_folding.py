"""Batch normalisation in evaluation mode is part of its neighbouring layer for the pass, and of nothing else afterwards."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lrp_prune
from lrp_prune.attribution import UnfoldedNormalizationWarning
from tests.support.convolutional import randomized
from tests.support.folded import EXACT, GAMMA, chain, relevance, scaling, target
from tests.support.written_rules import CONSERVING, RULES, Case, declared


def merged(layer: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A convolution that is the two of them."""
    scale, shift = scaling(norm)
    result = nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, groups=layer.groups
    ).double()
    result.weight.data = layer.weight.detach() * scale[:, None, None, None]
    assert result.bias is not None
    result.bias.data = shift + (0 if layer.bias is None else layer.bias.detach() * scale)
    return result


FOLDED = ["linear with bias", "conv1d, strided and dilated", "conv2d with bias", "conv2d, grouped and padded", "conv3d"]
FOLDED += ["conv_transpose1d", "conv_transpose2d, grouped, with bias"]


@pytest.mark.parametrize("norm", ["before", "after"])
@pytest.mark.parametrize("layer", FOLDED)
@pytest.mark.parametrize("rule", RULES)
def test_inputs_and_weights_have_the_relevance_of_the_folded_layer(rule: str, layer: str, norm: str) -> None:
    case = Case(layer, RULES[rule][1], norm=norm)
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    with lrp_prune.attributing(case.model, declared(RULES[rule][0])) as propagation:
        (found,) = propagation.relevance(case.target(case.model, case.x)).values()
    torch.testing.assert_close(found, case.of_inputs, **EXACT)
    for statistic, of_messages in (
        ("signed", case.of_weights(case.messages).sum(0)),
        ("abs_token", case.of_weights(case.messages.abs()).sum(0)),
        ("abs_sample", case.of_weights(case.messages).abs().sum(0)),
    ):
        torch.testing.assert_close(case.found(RULES[rule][0], statistic), of_messages, **EXACT)
    if rule in CONSERVING[1:]:  # biases keep nothing
        expected = case.relevance[:, case.has_input].sum()
        torch.testing.assert_close(case.found(RULES[rule][0], "signed").sum(), expected, **EXACT)
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())


class Joined(nn.Module):
    """Two convolutions of one input, of which one is used once more, concatenated with the input; perhaps normalised before."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 2, 1, bias=False)
        self.norms = nn.ModuleList((nn.BatchNorm2d(4), nn.BatchNorm2d(2)))
        self.norm, self.last = nn.BatchNorm2d(6), nn.Conv2d(6, 3, 3, padding=1)
        self.norm_first = norm_first

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.one(x), self.two(x)]
        if self.norm_first:
            parts = [norm(part) for norm, part in zip(self.norms, parts, strict=True)]
        joined = torch.cat(parts, 1)
        return self.last((joined if self.norm_first else self.norm(joined)).relu())


@pytest.mark.parametrize("norm_first", [True, False])
def test_it_is_folded_through_a_concatenation(norm_first: bool) -> None:
    model = randomized(Joined(norm_first)).double()
    x = torch.randn(2, 3, 6, 6).double()
    plain = Joined(norm_first=True).double()
    scale, shift = scaling(model.norm)
    for index, channels in enumerate((slice(0, 4), slice(4, 6))):
        norm: Any = model.norms[index]
        if not norm_first:
            norm.running_mean.zero_()
            norm.running_var.fill_(1.0)
            norm.eps = 0.0
            norm.weight.data, norm.bias.data = scale[channels], shift[channels]
        plain.norms[index] = nn.Identity()
    plain.one, plain.two = merged(model.one, model.norms[0]), merged(model.two, model.norms[1])
    plain.last = model.last
    torch.testing.assert_close(relevance(model, x)["x"], relevance(plain, x)["x"], **EXACT)
    found, expected = (
        lrp_prune.attribute(
            entry, [x], target, GAMMA, "abs_token", include=["*.weight"], exclude=["norm*"], matmul_dtype=None
        )
        for entry in (model, plain)
    )
    for name in ("one.weight", "two.weight", "last.weight"):
        torch.testing.assert_close(found.sums[name], expected.sums[name], rtol=1e-5, atol=1e-7)


def test_two_normalisations_before_a_concatenation_go_into_the_layer_after_it() -> None:
    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.BatchNorm2d(3), nn.Conv2d(5, 4, 3, padding=1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.last(torch.cat([self.norm(x.relu()), y.relu()], 1))

    model = randomized(Before()).double()
    x, y = torch.rand(2, 3, 5, 5).double() + 0.1, torch.rand(2, 2, 5, 5).double() + 0.1
    scale, shift = scaling(model.norm)
    scale, shift = torch.cat([scale, torch.ones(2).double()]), torch.cat([shift, torch.zeros(2).double()])
    with lrp_prune.attributing(model, GAMMA) as propagation:
        output = model(x, y)
        found = propagation.relevance(output[:, ::2].sum())
    weight, both = model.last.weight.detach() * scale[:, None, None], torch.cat([x, y], 1)
    ones = shift[None, :, None, None].expand(1, -1, 5, 5)
    bias = nn.functional.conv2d(ones, model.last.weight, model.last.bias, padding=1).detach()
    positive = nn.functional.conv2d(both, weight.clamp(min=0), padding=1) + bias.clamp(min=0)
    z = output.detach()
    total = z + 0.4 * torch.where(z > 0, positive, z - positive)
    d = torch.zeros_like(z)
    d[:, ::2] = 1.0
    ratio = d * z / total
    expected = both * sum(
        nn.functional.conv_transpose2d(ratio * (1 + 0.4 * (z * sign > 0).double()), part, padding=1)
        for sign, part in ((1, weight.clamp(min=0)), (-1, weight.clamp(max=0)))
    )
    torch.testing.assert_close(torch.cat([found["x"], found["y"]], 1), expected, **EXACT)


class Shared(nn.Module):
    """A convolution that two normalisations follow, and something else as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.one, self.two = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.last(self.one(y).relu() + self.two(y).relu() + y.relu() + self.one(self.layer(2 * x)).relu())


def test_a_layer_that_several_read_is_folded_with_each_for_itself() -> None:
    class Apart(Shared):
        def __init__(self, shared: Shared) -> None:
            super().__init__()
            self.first, self.second = merged(shared.layer, shared.one), merged(shared.layer, shared.two)
            self.layer, self.last = shared.layer, shared.last

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).relu() + self.second(x).relu()
            return self.last(y + self.layer(x).relu() + self.first(2 * x).relu())

    model = randomized(Shared()).double()
    apart, x = Apart(model), torch.randn(2, 3, 6, 6).double()
    torch.testing.assert_close(relevance(model, x)["x"], relevance(apart, x)["x"], **EXACT)
    found, expected = (
        lrp_prune.attribute(
            entry,
            [x],
            target,
            GAMMA,
            "signed",
            include=["*layer*", "*first*", "*second*"][: 1 if entry is model else 3],
            matmul_dtype=None,
        )
        for entry in (model, apart)
    )
    together = sum(expected.sums[name] for name in ("first.weight", "second.weight", "layer.weight"))
    torch.testing.assert_close(found.sums["layer.weight"], together, rtol=1e-5, atol=1e-7)


def test_it_is_folded_in_recomputed_layers() -> None:
    class Recomputed(nn.Module):
        def __init__(self, layers: nn.Sequential, parts: list[slice]) -> None:
            super().__init__()
            self.layers, self.parts = layers, parts

        def forward(self, input: Tensor) -> Tensor:
            for part in self.parts:
                input = checkpoint(self.layers[part], input, use_reentrant=False)
            return input

    model, x = randomized(chain()).double(), torch.randn(2, 3, 6, 6).double()
    expected = relevance(model, x)["input"]
    whole = Recomputed(model, [slice(0, 4), slice(4, 9)])
    torch.testing.assert_close(relevance(whole, x)["input"], expected, **EXACT)
    # A normalisation that is recomputed without its layer cannot be folded into it, and that is told.
    parted = Recomputed(model, [slice(0, 5), slice(5, 9)])
    with pytest.warns(UnfoldedNormalizationWarning, match=r"layers\.5 \(BatchNorm2d\)"):
        assert not torch.allclose(relevance(parted, x)["input"], expected, rtol=1e-3)


@pytest.mark.parametrize(("dim", "folded"), [(1, True), (-3, True), (0, False), (-1, False)])
def test_a_concatenation_is_one_of_channels_or_nothing_is_folded_through_it(dim: int, folded: bool) -> None:
    class Along(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            self.norm, self.between = nn.BatchNorm2d(8 if folded else 4), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.between(torch.cat([self.one(x), self.two(x)], dim))).relu()

    model, x = randomized(Along()).double(), torch.randn(2, 3, 6, 6).double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = relevance(model, x)["x"]
    assert [entry.category for entry in caught] == ([] if folded else [UnfoldedNormalizationWarning])
    model.between = nn.Upsample(scale_factor=1)  # behind which nothing is folded
    with pytest.warns(UnfoldedNormalizationWarning):
        assert torch.allclose(found, relevance(model, x)["x"], rtol=1e-9) != folded
