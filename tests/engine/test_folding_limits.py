"""Where a batch normalisation is not folded, and what folding leaves as it was."""

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Composite
from lrp_prune.attribution import AlphaBeta, Epsilon, Gamma, UnfoldedNormalizationWarning, ZPlus
from tests.support.convolutional import randomized
from tests.support.folded import EXACT, GAMMA, chain, relevance, scaling


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
