"""Rules for pooling and for sums of activations, against their formulas written out, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Composite
from lrp_prune.attribution import EpsilonSum, EqualShares, Proportional, SizeShares, Winner

EXACT = {"rtol": 1e-10, "atol": 1e-12}
POOLING: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "average, 1d": (lambda: nn.AvgPool1d(2), (3, 8)),
    "average, 2d, overlapping": (lambda: nn.AvgPool2d(3, 2), (2, 7, 7)),
    "average, 3d": (lambda: nn.AvgPool3d(2), (2, 4, 4, 4)),
    "adaptive average, 1d": (lambda: nn.AdaptiveAvgPool1d(3), (2, 7)),
    "adaptive average, 2d": (lambda: nn.AdaptiveAvgPool2d((2, 3)), (2, 5, 7)),
    "adaptive average, 3d": (lambda: nn.AdaptiveAvgPool3d(2), (2, 4, 5, 4)),
    "maximum, 1d, dilated": (lambda: nn.MaxPool1d(2, 1, dilation=2), (3, 8)),
    "maximum, 2d, padded": (lambda: nn.MaxPool2d(3, 2, 1), (2, 7, 7)),
    "maximum, 2d, rounded up": (lambda: nn.MaxPool2d(2, 2, ceil_mode=True), (2, 5, 6)),
    "maximum, 2d, padded and rounded up": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), (2, 6, 8)),
    "maximum, 2d, rounded up into the padding": (lambda: nn.MaxPool2d(2, 3, 1, ceil_mode=True), (2, 5, 5)),
    "maximum, 3d": (lambda: nn.MaxPool3d(2), (2, 4, 4, 5)),
    "adaptive maximum, 1d": (lambda: nn.AdaptiveMaxPool1d(3), (2, 7)),
    "adaptive maximum, 2d": (lambda: nn.AdaptiveMaxPool2d((2, 3)), (2, 5, 7)),
    "adaptive maximum, 3d": (lambda: nn.AdaptiveMaxPool3d(2), (2, 4, 5, 4)),
}


def windows(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """``[outputs, inputs]`` of one channel: which entries an output looks at, by what a change of each does to the output."""
    places = shape[1:]
    entries = torch.Size(places).numel()
    # Each entry in turn is by far the largest: wherever it is looked at, it is the maximum, and moves the average.
    probes = torch.eye(entries).double().mul(1e3).reshape(entries, 1, *places)
    return (layer(probes).flatten(1) > 0).T.double()


def relevance(model: nn.Module, x: Tensor, c: Tensor, rules: dict[Any, Any]) -> Tensor:
    with lrp_prune.attributing(model, Composite("pooled", rules)) as propagation:
        return propagation.relevance((model(x) * c).sum())["input"]


@pytest.mark.parametrize("stabilizer", [0.0, 0.3])
@pytest.mark.parametrize("name", POOLING)
def test_entries_of_a_window_have_relevance_by_their_size(name: str, stabilizer: float) -> None:
    make, shape = POOLING[name]
    layer = make()
    torch.manual_seed(0)
    x = torch.randn(2, *shape).double()
    z = layer(x)
    c = torch.randn_like(z)
    seen = windows(layer, shape)
    expected = torch.zeros_like(x).flatten(2)
    rows, count = x.flatten(2), seen.sum(1)
    padded = "padded" in name or "rounded" in name
    count = torch.full_like(count, 9.0 if "3, 2" in repr(layer) or "padded" in name else 4.0) if padded else count
    for sample in range(2):
        for channel in range(shape[0]):
            for output, value in enumerate(z[sample, channel].flatten()):
                n = seen[output] * rows[sample, channel] / count[output]
                total = n.sum() + stabilizer * (1 if n.sum() >= 0 else -1)
                expected[sample, channel] += n / total * value * c[sample, channel].flatten()[output]
    kind = "average_pooling" if "average" in name else "max_pooling"
    found = relevance(layer, x, c, {kind: Proportional(stabilizer)})
    torch.testing.assert_close(found, expected.view_as(x), **EXACT)


@pytest.mark.parametrize("name", [name for name in POOLING if "maximum" in name])
def test_the_winner_takes_all(name: str) -> None:
    make, shape = POOLING[name]
    layer = make()
    torch.manual_seed(0)
    x = torch.randn(2, *shape).double()
    z = layer(x)
    c = torch.randn_like(z)
    seen, expected = windows(layer, shape), torch.zeros_like(x).flatten(2)
    for sample in range(2):
        for channel in range(shape[0]):
            for output, value in enumerate(z[sample, channel].flatten()):
                inside = x[sample, channel].flatten().masked_fill(seen[output] == 0, -1e9)
                expected[sample, channel, inside.argmax()] += value * c[sample, channel].flatten()[output]
    torch.testing.assert_close(relevance(layer, x, c, {"max_pooling": Winner()}), expected.view_as(x), **EXACT)
    torch.testing.assert_close(relevance(layer, x, c, {}), expected.view_as(x), **EXACT)


def test_indices_of_the_largest_come_along() -> None:
    class Indexed(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            values, indices = nn.functional.max_pool2d(input, 2, return_indices=True)
            return nn.functional.max_unpool2d(values, indices, 2)

    x = torch.rand(1, 1, 4, 4).double()
    found = relevance(Indexed(), x, torch.ones(1, 1, 4, 4).double(), {"max_pooling": "proportional"})
    largest, total = nn.functional.max_pool2d(x, 2), 4 * nn.functional.avg_pool2d(x, 2)
    torch.testing.assert_close(found, x * (largest / total).repeat_interleave(2, 2).repeat_interleave(2, 3), **EXACT)


class Summing(nn.Module):
    """A branch beside what it is added to."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.branch = way, nn.Linear(4, 4, bias=False).double()

    def forward(self, input: Tensor) -> Tensor:
        branch = self.branch(input)
        if self.way == "in place":
            branch += input
            return branch
        if self.way == "difference":
            return branch - input
        return torch.add(branch, input, alpha=0.5) if self.way == "scaled" else branch + input


FACTORS = {"sum": 1.0, "in place": 1.0, "difference": -1.0, "scaled": 0.5}
RULES: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "epsilon": (EpsilonSum(0.3), lambda a, b: a / (a + b + 0.3 * (a + b).sign())),
    "size": (SizeShares(), lambda a, b: a.abs() / (a.abs() + b.abs())),
    "equal": (EqualShares(), lambda a, b: torch.full_like(a, 0.5)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("way", FACTORS)
def test_summands_share_the_relevance_of_their_sum(way: str, rule: str) -> None:
    torch.manual_seed(0)
    model, x = Summing(way), torch.randn(3, 4).double()
    one, other = model.branch(x).detach(), FACTORS[way] * x
    z, c = model(x).detach(), torch.randn(3, 4).double()
    ours, share = RULES[rule]
    torch.testing.assert_close(z, one + other)
    of_branch = share(one, other) * c * z
    through = (of_branch / one) @ model.branch.weight.detach() * x
    expected = through + share(other, one) * c * z
    torch.testing.assert_close(relevance(model, x, c, {"sum": ours}), expected, **EXACT)
    scored = lrp_prune.attribute(
        model, [x], lambda m, b: (m(b) * c).sum(), Composite("shared", {"sum": ours}), "signed", matmul_dtype=None
    )
    torch.testing.assert_close(scored.sums["branch.weight"].sum(), of_branch.sum(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("samples", [1, 3])
def test_what_is_broadcast_has_the_shares_of_all_places(rule: str, samples: int) -> None:
    """The same of positions that are added to a batch as of those that are repeated for it."""

    class Placed(nn.Module):
        def __init__(self, repeated: bool) -> None:
            super().__init__()
            self.places, self.repeated = nn.Parameter(torch.linspace(-1, 2, 8).view(1, 2, 4).double()), repeated

        def forward(self, input: Tensor) -> Tensor:
            places = self.places + 0 * input[:1]
            return input + (places.expand(len(input), -1, -1).clone() if self.repeated else places)

    torch.manual_seed(0)
    x, c = torch.randn(samples, 2, 4).double(), torch.randn(samples, 2, 4).double()
    ours, share = RULES[rule]
    found = [relevance(Placed(repeated), x, c, {"sum": ours}) for repeated in (False, True)]
    torch.testing.assert_close(found[0], found[1], **EXACT)
    places = torch.linspace(-1, 2, 8).view(1, 2, 4).double().expand_as(x)
    torch.testing.assert_close(found[0], share(x, places) * c * (x + places), **EXACT)


def test_sums_with_constants_are_left_alone() -> None:
    class Shifted(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return input + 1.0

    x, c = torch.randn(3, 4).double(), torch.ones(3, 4).double()
    torch.testing.assert_close(relevance(Shifted(), x, c, {"sum": "equal_shares"}), relevance(Shifted(), x, c, {}))


def test_rules_of_pooling_and_sums_are_refused_elsewhere() -> None:
    with pytest.raises(ValueError, match=r"rule for \('sum',\), not for 'max_pooling'"):
        Composite("wrong", {"max_pooling": "equal_shares"})
    with pytest.raises(ValueError, match=r"rule for \('max_pooling',\), not for 'average_pooling'"):
        Composite("wrong", {"average_pooling": "winner"})
    with pytest.raises(ValueError, match=r"stabilizer must be a number in \[0, inf\), got -1"):
        Proportional(-1)
