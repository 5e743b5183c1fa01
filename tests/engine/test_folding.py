"""Batch normalisation in evaluation mode is part of its neighbouring layer for the pass, and of nothing else afterwards."""

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lrp_prune
from lrp_prune import Composite
from lrp_prune.attribution import AlphaBeta, Epsilon, Gamma, UnfoldedNormalizationWarning, ZPlus
from tests.support.convolutional import randomized
from tests.support.written_rules import CONSERVING, RULES, Case, declared

EXACT = {"rtol": 1e-9, "atol": 1e-10}
GAMMA = Composite("folded", {"layer": Gamma(0.4)}, base="epsilon")


def relevance(model: nn.Module, x: Tensor, composite: str | Composite = GAMMA, **given: Any) -> dict[str, Tensor]:
    with lrp_prune.attributing(model, composite, **given) as propagation:
        return propagation.relevance(target(model, x))


def target(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).flatten(1)[:, ::2].sum()


def scaling(norm: Any) -> tuple[Tensor, Tensor]:
    scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias.detach() - norm.running_mean * scale


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


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip


@pytest.mark.parametrize("rule", [Gamma(0.4), AlphaBeta(2, 1), ZPlus(), Epsilon(0.1)])
def test_what_is_looked_at_changes_nothing(rule: Any) -> None:
    """Outputs of layers and normalisations have the relevance of the folded layer's output, and what comes of it is the same."""
    model, x = randomized(chain()).double(), torch.randn(2, 3, 6, 6).double()
    composite = Composite("folded", {"layer": rule}, base="epsilon")
    alone = relevance(model, x, composite)
    looked = relevance(model, x, composite, latent=["1", "2", "4", "5"])
    torch.testing.assert_close(looked["input"], alone["input"], **EXACT)
    for layer, norm in (("1", "2"), ("4", "5")):
        torch.testing.assert_close(looked[layer], looked[norm], **EXACT)


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


def test_what_cannot_be_folded_is_told_by_name_once() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)))
    x = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        relevance(model, x)
    told = [str(entry.message) for entry in caught if entry.category is UnfoldedNormalizationWarning]
    assert len(told) == 1 and "2 (BatchNorm2d)" in told[0]


@pytest.mark.parametrize(
    ("composite", "train"),
    [("epsilon", False), (Composite("passed", {"layer": Gamma(), "normalization": "identity"}), False)],
)
def test_nothing_is_told_where_it_makes_no_difference_or_has_a_rule(composite: Any, train: bool) -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        relevance(model, torch.randn(2, 3, 8, 8), composite)
        relevance(randomized(chain()), torch.randn(2, 3, 6, 6))


def test_in_training_mode_it_is_not_folded_and_told() -> None:
    model = randomized(chain()).train()
    with pytest.warns(UnfoldedNormalizationWarning, match=r"2 \(BatchNorm2d\), 5 \(BatchNorm2d\)"):
        relevance(model, torch.randn(2, 3, 6, 6))


def test_nothing_is_left_behind_by_an_error() -> None:
    model = randomized(chain())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(torch.ones(2, 3, 6, 6)).clone()
    with pytest.raises(RuntimeError, match="stopped"), lrp_prune.attributing(model, GAMMA) as propagation:
        value = model(torch.ones(2, 3, 6, 6)).sum()
        value.register_hook(_stop)
        propagation.relevance(value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(torch.ones(2, 3, 6, 6)), expected)


def _stop(gradient: Tensor) -> None:
    raise RuntimeError("stopped")


def test_without_rules_that_fold_the_input_of_a_normalisation_is_not_kept() -> None:
    model, seen = randomized(nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(3), nn.ReLU())), []
    handle = model[1].register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    with lrp_prune.attributing(model, "epsilon"):
        output = model(torch.randn(2, 3, 4, 4))
        assert output.requires_grad and [reference() for reference in seen] == [None]
    handle.remove()


def test_values_in_the_mode_are_the_models_own() -> None:
    model, x = randomized(chain()), torch.randn(2, 3, 6, 6)
    expected = model(x)
    with lrp_prune.attributing(model, GAMMA):
        assert torch.equal(model(x), expected)


def test_several_values_of_one_forward_are_explained_each_for_itself() -> None:
    """What is handed over in one backward pass is not taken for that of the next one."""
    model, x = randomized(chain()).double(), torch.randn(2, 3, 6, 6).double()

    def found(*columns: int) -> list[Tensor]:
        with lrp_prune.attributing(model, GAMMA) as propagation:
            output = model(x)
            leaf = propagation.roots()[0].leaf
            made = [torch.autograd.grad(output[:, column].sum(), leaf, retain_graph=True)[0] for column in columns]
            return [gradient * leaf.detach() for gradient in made]

    (one,), (two,), both = found(0), found(1), found(0, 1)
    torch.testing.assert_close(both[0], one)
    torch.testing.assert_close(both[1], two)


def test_what_a_layer_tells_in_a_pass_that_ends_before_the_normalisation_is_not_heard_in_the_next() -> None:
    class Beside(nn.Module):
        """A normalisation that goes into the layer after it, and out of the model as well."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.norm(x)
            return self.last(y), y

    model, x = randomized(Beside()).double(), torch.rand(2, 3, 5, 5).double()
    with lrp_prune.attributing(model, GAMMA) as propagation:
        output, normalized = model(x)
        leaf = propagation.roots()[0].leaf
        torch.autograd.grad(output.sum(), normalized, retain_graph=True)
        (found,) = torch.autograd.grad(normalized.sum(), leaf)
    expected = scaling(model.norm)[0][:, None, None].expand_as(x)
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_normalisation_whose_input_is_written_to_before_the_layer_runs_is_not_folded_into_it() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)
            self.between = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            h = x.relu()
            y = self.between(self.norm(h))
            h += x
            return self.last(y) + h

    model, x = randomized(Written()).double(), torch.rand(2, 3, 5, 5).double() + 0.1
    with pytest.warns(UnfoldedNormalizationWarning, match=r"norm \(BatchNorm2d\)"):
        found = relevance(model, x)["x"]
    model.between = nn.Upsample(scale_factor=1)  # behind which nothing is folded either
    with pytest.warns(UnfoldedNormalizationWarning, match=r"norm \(BatchNorm2d\)"):
        torch.testing.assert_close(found, relevance(model, x)["x"], **EXACT)


def test_what_is_written_to_in_place_is_no_more_what_it_came_out_of() -> None:
    found = {}
    x = torch.randn(2, 3, 8, 8).double()
    for inplace in (True, False):
        layers = (nn.Conv2d(3, 4, 3), nn.ReLU(inplace), nn.BatchNorm2d(4), nn.ReLU(inplace), nn.Conv2d(4, 2, 3))
        model = randomized(nn.Sequential(*layers)).double()
        with pytest.warns(UnfoldedNormalizationWarning, match=r"2 \(BatchNorm2d\)"):
            found[inplace] = relevance(model, x)["input"]
    torch.testing.assert_close(found[True], found[False], **EXACT)


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


def test_a_forward_that_nothing_is_asked_of_is_freed_in_the_mode() -> None:
    class Kept:
        pass

    model, seen = randomized(chain()), []

    def note(module: nn.Module, args: Any) -> None:
        kept = Kept()
        args[0].grad_fn.metadata["kept"] = kept
        seen.append(weakref.ref(kept))

    with model[2].register_forward_pre_hook(note), lrp_prune.attributing(model, GAMMA):
        model(torch.randn(2, 3, 6, 6))
        gc.collect()
        assert [reference() for reference in seen] == [None]


def test_a_normalisation_of_which_a_layer_has_taken_in_a_part_goes_into_no_other_one() -> None:
    class Parted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(7), nn.Conv2d(7, 2, 3)
            self.between = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.between(self.norm(torch.cat([self.one(x), x.relu()], 1))))

    model, x = randomized(Parted()).double(), torch.randn(2, 3, 6, 6).double()
    found = []
    for between in (nn.Identity(), nn.Upsample(scale_factor=1)):  # behind which nothing is folded
        model.between = between
        with pytest.warns(UnfoldedNormalizationWarning, match=r"norm \(BatchNorm2d\)"):
            found.append(relevance(model, x)["x"])
    torch.testing.assert_close(found[0], found[1], **EXACT)
