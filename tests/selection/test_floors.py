"""No tensor is pruned beyond its limit, and exactly as much is pruned of all as without limits."""

import math
import random
import sys
from fractions import Fraction

import pytest
import torch

import lrp_prune
from lrp_prune.callbacks import RelevancePruning
from lrp_prune.pruning import METHODS, Masks, Scope, select
from lrp_prune.pruning.scope import settled
from lrp_prune.relevance import Relevance
from lrp_prune.relevance.unscored import UNREACHED
from lrp_prune.selection import floors, together

select_module = sys.modules["lrp_prune.pruning.select"]  # a function of that package has its name


def in_order(relevance, number, floor, order, existing=None):
    """Masks by going through all entries in their order, past those of tensors that are full."""
    total = sum(relevance[name].numel() for name in relevance)
    share = 1 - Fraction(str(floor)) * (1 - Fraction(number, total))
    kept = {name: torch.ones(relevance[name].shape, dtype=torch.bool) for name in relevance}
    entries, left = [], {}
    for position, name in enumerate(relevance):
        values = relevance[name].reshape(-1).double()
        values = values.abs() if order == "absolute" else values
        old = None if existing is None else existing[name].reshape(-1)
        pruned = 0 if old is None else int((~old).sum())
        left[name] = max(math.ceil(values.numel() * share), pruned)
        entries += [
            (-math.inf if old is not None and not old[i] else float(value), position, i, name)
            for i, value in enumerate(values)
        ]
    for _, _, i, name in sorted(entries):
        if number and left[name]:
            kept[name].view(-1)[i] = False
            left[name] -= 1
            number -= 1
    return Masks(kept)


def uneven(generator, chance, ties):
    """Tensors of different sizes and scales."""
    values = {}
    for index in range(chance.randint(1, 6)):
        shape = tuple(chance.randint(1, 9) for _ in range(chance.randint(1, 3)))
        value = torch.randn(shape, generator=generator) * 4.0 ** chance.randint(-3, 3)
        values[f"layers.{index}.weight"] = value.round() if ties else value
    return Relevance(values, statistic="signed")


@pytest.mark.parametrize("order", ["absolute", "signed"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_what_comes_first_is_pruned_past_tensors_that_are_full(order, ties, seed):
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    relevance = uneven(generator, chance, ties)
    total = sum(relevance[name].numel() for name in relevance)
    floor = chance.choice([0.0, 0.1, 0.3, 0.5, 0.9, 1.0, chance.random()])
    first, second = sorted(chance.random() for _ in range(2))
    masks = select(relevance, first, scope=Scope(order=order, floor=floor))
    assert masks.num_pruned == round(first * total)
    assert masks == in_order(relevance, round(first * total), floor, order)
    # A later round with other scores; the first one may have had no floor, and gone far beyond the second one's limits.
    other = Relevance({name: relevance[name].flip(0) for name in relevance}, statistic="signed")
    for before in (masks, select(relevance, first, scope=Scope(order=order, floor=0))):
        after = select(other, second, scope=Scope(order=order, floor=floor), existing=before)
        assert after.num_pruned == round(second * total)
        assert after & before == after
        assert after == in_order(other, round(second * total), floor, order, before)


def saturated(factor=1e-3):
    generator = torch.Generator().manual_seed(0)
    scales = {"query": factor, "value": 1.0, "up": 1.0}
    return Relevance({name: torch.randn(20, 30, generator=generator) * s for name, s in scales.items()})


def test_a_layer_without_relevance_keeps_its_share():
    relevance = saturated()
    assert select(relevance, 0.4, Scope(floor=0)).pruned_in("query") == 600
    half = select(relevance, 0.4)
    assert half.pruned_in("query") == 600 - 180 and half.num_pruned == 720
    # Where one tensor is at its limit, the others are as ranked together without it.
    others = select(Relevance({name: relevance[name] for name in ("value", "up")}), 300 / 1200, Scope(floor=0))
    assert all(torch.equal(half[name], others[name]) for name in others)
    alike = select(relevance, 0.4, Scope(floor=1.0))
    assert alike == select(relevance, 0.4, scope="layer")


def test_masks_are_made_once_however_often_the_rest_is_ranked(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    scales = {f"layers.{index}.weight": 1.5**index for index in range(24)}
    relevance = Relevance({name: torch.randn(40, 50, generator=generator) * scale for name, scale in scales.items()})
    rankings, made = [], []
    smallest_of, masks_of = select_module.smallest_of, together.ChosenTogether.masks
    monkeypatch.setattr(
        select_module,
        "smallest_of",
        lambda values, names, *rest: rankings.append(names) or smallest_of(values, names, *rest),
    )
    monkeypatch.setattr(together.ChosenTogether, "masks", lambda choice: made.extend(choice.pruned) or masks_of(choice))
    masks = select(relevance, 0.5)
    assert masks == in_order(relevance, 24000, 0.5, "absolute")
    full = [name for name in scales if masks.pruned_in(name) == 1500]
    assert len(full) > 5 and len([names for names in rankings if len(names) > 1]) == 3
    assert sorted(made) == sorted(scales)


def test_by_default_half_of_the_average_density_is_kept_by_every_method():
    relevance = saturated()
    assert select(relevance, 0.4) == select(relevance, 0.4, Scope(floor=0.5)) != select(relevance, 0.4, Scope(floor=0))
    for method in METHODS.values():
        options = settled("global", method(), ("weight",))
        assert options.floor == floors.DEFAULT == 0.5
        assert settled("layer", method(), ("weight",)).floor == 0
        assert settled("global", method(), ("head", "neuron")).floor == 0
    assert settled(Scope(floor=0.25), METHODS["lrp"](), ("weight",)) == Scope("global", 0.25)


def test_each_pattern_has_its_own_limits_and_unscored_weights_are_made_up_for():
    relevance = saturated()
    masks = select(relevance, {"[qv]*": 0.5, "up": 0.9}, Scope(floor=0.8))
    assert masks.pruned_in("query") == math.ceil(600 * (1 - 0.8 * 0.5)) and masks.pruned_in("up") == 540
    assert masks.pruned_in("value") == 600 - masks.pruned_in("query")
    shapes = {name: tuple(relevance[name].shape) for name in relevance} | {"pooler": (10, 60)}
    values = {name: relevance[name] for name in relevance}
    partial = Relevance(values, parameter_shapes=shapes, unscored={"pooler": UNREACHED})
    with pytest.warns(lrp_prune.relevance.unscored.UnscoredWeightsWarning):
        masks = select(partial, 0.45)  # 1080 of 2400, which is 0.6 of the 1800 that are scored
    assert masks.num_pruned == 1080 and masks.pruned_in("query") == 480


def test_a_floor_that_means_nothing_is_refused():
    relevance = saturated()
    for floor in (-0.1, 1.5, math.nan, "0.5", True):
        with pytest.raises(ValueError, match=r"floor must be None or a number in \[0, 1\]"):
            select(relevance, 0.5, Scope(floor=floor))
    for scope in ("layer", "row", "column", "2:5"):
        with pytest.raises(ValueError, match=rf"floor=0.5 is for scope 'global': scope '{scope}'"):
            select(relevance, 0.5, scope=Scope(scope, floor=0.5))
        rate = 0.6 if scope == "2:5" else 0.5
        assert select(relevance, rate, scope=Scope(scope, floor=0)) == select(relevance, rate, scope=scope)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    batch = (torch.randn(3, 4), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match=r"floor=0.5 is for granularity 'weight', not for 'neuron'"):
        lrp_prune.prune(model, [batch], granularity="neuron", scope=Scope(floor=0.5))
    with pytest.raises(ValueError, match=r"floor=0.5 is for scope 'global': scope 'row'"):
        lrp_prune.prune(model, [batch], method="wanda", scope=Scope(floor=0.5))
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    with pytest.raises(MisconfigurationException, match=r"floor=0.5 is for scope 'global': scope 'row'"):
        RelevancePruning(method="wanda", scope=Scope(floor=0.5))


class Faint(torch.nn.Module):
    """A branch that adds next to nothing to what the head reads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.branch, self.head = (torch.nn.Linear(16, width) for width in (16, 16, 3))

    def forward(self, inputs):
        hidden = self.stem(inputs).relu()
        return self.head(hidden + 1e-4 * self.branch(hidden))


def test_prune_keeps_the_floor_over_rounds_and_attribute_then_select_do_the_same():
    model = Faint()
    batches = [(torch.randn(8, 16), torch.randint(3, (8,))) for _ in range(2)]
    expected = select(lrp_prune.attribute(model, batches), 0.5)
    assert expected != select(lrp_prune.attribute(model, batches), 0.5, Scope(floor=0))
    assert lrp_prune.prune(model, batches, 0.5) == expected
    assert expected.sparsity_of("branch.weight") == 0.75 and expected.sparsity == 0.5
    masks = lrp_prune.prune(Faint(), batches, 0.5, scope=Scope(floor=0.25), rounds=3)
    assert masks.sparsity_of("branch.weight") == 0.875 and masks.sparsity == 0.5
    assert lrp_prune.prune(Faint(), batches, 0.5, scope=Scope(floor=0)).sparsity_of("branch.weight") > 0.95
