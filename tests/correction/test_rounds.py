"""A correction in rounds: relevance of the corrected model, more weights, one patch of the model as it was."""

import pytest
import torch
from torch import nn

from lrp_prune import Patch, Relevance


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


def sets(model: nn.Module, seed: int) -> tuple[Relevance, Relevance]:
    generator = torch.Generator().manual_seed(seed)

    def one() -> Relevance:
        values = {
            name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters() if p.dim() > 1
        }
        return Relevance(values, statistic="signed")

    return one(), one()


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_a_second_round_adds_weights_and_keeps_the_first(model: nn.Module, strength: float) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = Patch.from_contrast(model, *sets(model, 1), amount=8)
    first.apply_(model, strength)
    applied = {name: value.clone() for name, value in model.state_dict().items()}
    both = Patch.from_contrast(model, *sets(model, 1), amount=7, extends=first)
    assert all(torch.equal(value, applied[name]) for name, value in model.state_dict().items())
    assert first.strength_in(model) == pytest.approx(strength)
    assert both.num_entries == 15
    assert sum(both.overlap(first).values()) == 8
    assert both.provenance["extends"] == first.provenance
    first.revert_(model)
    both.apply_(model, strength)
    both.revert_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_second_round_chooses_the_best_of_the_rest(model: nn.Module) -> None:
    general, undesired = sets(model, 2)
    everything = Patch.from_contrast(model, general, undesired, amount=12, guard=None)
    first = Patch.from_contrast(model, general, undesired, amount=5, guard=None)
    first.apply_(model)
    both = Patch.from_contrast(model, general, undesired, amount=7, guard=None, extends=first)
    assert both == everything


def test_spared_weights_are_not_chosen(model: nn.Module) -> None:
    general, undesired = sets(model, 2)
    everything = Patch.from_contrast(model, general, undesired, amount=12, guard=None)
    first, rest = (
        {name: everything[name].positions[part] for name in everything} for part in (slice(0, 2), slice(2, None))
    )
    other = Patch.from_contrast(model, general, undesired, sum(map(len, rest.values())), guard=None, spared=first)
    assert all(torch.equal(other[name].positions, positions) for name, positions in rest.items() if len(positions))
    # Beside what a further round extends.
    extended = Patch.from_positions(model, rest)
    extended.apply_(model)
    more = Patch.from_contrast(model, general, undesired, 4, guard=None, extends=extended, spared=first)
    assert more.num_entries == extended.num_entries + 4
    assert not more.overlap(Patch.from_positions(model, first))


def test_what_a_patch_has_is_no_candidate(model: nn.Module) -> None:
    first = Patch.from_contrast(model, *sets(model, 3), amount=30, guard=None)
    first.apply_(model)
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    with pytest.raises(ValueError, match=f"only {total - 30} of {total} may be removed"):
        Patch.from_contrast(model, *sets(model, 3), amount=total - 29, guard=None, extends=first)


def test_a_patch_that_is_not_applied_is_not_extended(model: nn.Module) -> None:
    first = Patch.from_contrast(model, *sets(model, 3), amount=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="not applied"):
        Patch.from_contrast(model, *sets(model, 3), amount=3, extends=first)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_are_spared_among_weights_only(model: nn.Module) -> None:
    first = Patch.from_contrast(model, *sets(model, 3), amount=3)
    first.apply_(model)
    units = [Relevance({"0": torch.randn(5)}, granularity="neuron", statistic="signed") for _ in range(2)]
    with pytest.raises(ValueError, match="not among neurons"):
        Patch.from_contrast(model, *units, amount=1, extends=first)
