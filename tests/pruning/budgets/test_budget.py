"""Shares by tensor: what they sum to, how they are rounded, and that every selection takes them."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lrp_prune
from lrp_prune.pruning.budgets import Budget
from lrp_prune.pruning.budgets.budget import groups_by, of_groups, spread_around
from lrp_prune.relevance import Relevance
from tests.support.small_models import build

SIZES = {"a": 1000, "b": 250, "c": 37}


def test_shares_keep_the_sparsity_of_all_and_the_order_of_what_is_wanted() -> None:
    for sparsity in (0.0, 0.1, 0.5, 0.9, 0.98):
        shares = spread_around([3.0, 1.0, 2.0], list(SIZES.values()), sparsity, 0.2)
        assert sum(share * size for share, size in zip(shares, SIZES.values(), strict=True)) == pytest.approx(
            sparsity * sum(SIZES.values()), abs=1e-6
        )
        assert 0 <= shares[1] <= shares[2] <= shares[0] <= 0.99
        if 0.3 < sparsity < 0.7:
            assert shares[0] - shares[1] == pytest.approx(0.4)
            assert shares[2] - shares[1] == pytest.approx(0.2)


def test_where_nothing_tells_them_apart_all_lose_alike() -> None:
    assert spread_around([2.0, 2.0], [10, 30], 0.3, 0.2) == pytest.approx([0.3, 0.3])


def test_whole_entries_sum_to_what_is_asked_for() -> None:
    for sparsity in (0.5, 0.123, 0.77):
        budget = of_groups([["a"], ["b", "c"]], spread_around([1.0, 0.0], [1000, 287], sparsity, 0.1), SIZES, sparsity)
        counts = {name: share * SIZES[name] for name, share in budget.items()}
        assert all(abs(count - round(count)) < 1e-9 for count in counts.values())
        assert round(sum(counts.values())) == round(sparsity * sum(SIZES.values()))


def test_a_selection_prunes_each_tensor_by_its_share() -> None:
    torch.manual_seed(0)
    relevance = Relevance({name: torch.randn(size, 4) for name, size in SIZES.items()}, statistic="signed")
    budget = Budget({"a": 0.25, "b": 0.5, "c": 0.75}, {name: 4 * size for name, size in SIZES.items()})
    masks = lrp_prune.select(relevance, budget)
    assert {name: masks.pruned_in(name) / (4 * size) for name, size in SIZES.items()} == pytest.approx(dict(budget))
    assert masks.sparsity == pytest.approx(budget.sparsity)


def test_steps_are_as_near_as_they_can_be_and_selected_in_groups_of_inputs() -> None:
    torch.manual_seed(0)
    values = {"a": torch.randn(6, 16), "b": torch.randn(10, 8), "c": torch.randn(4, 24)}
    sizes = {name: value.numel() for name, value in values.items()}
    budget = Budget({"a": 0.43, "b": 0.55, "c": 0.61}, sizes)
    steps = budget.in_steps(8)
    for name, share in steps.items():
        assert (share * 8).is_integer() and abs(share - budget[name]) < 1 / 8
    assert abs(steps.sparsity - budget.sparsity) <= max(sizes.values()) / 16 / sum(sizes.values())
    masks = lrp_prune.select(Relevance(values, statistic="signed"), steps, "N:8")
    for name, value in values.items():
        pruned = (~masks[name]).reshape(-1, 8).sum(1)
        assert pruned.eq(round(steps[name] * 8)).all(), name
        gone = value.abs().reshape(-1, 8).masked_fill(masks[name].reshape(-1, 8), 0).amax(1)
        kept = value.abs().reshape(-1, 8).masked_fill(~masks[name].reshape(-1, 8), 9).amin(1)
        assert bool((gone <= kept).all())


def test_a_tensor_whose_share_is_a_step_keeps_it() -> None:
    steps = Budget({"large": 0.43, "none": 0.0, "half": 0.5}, {"large": 1000, "none": 30, "half": 20}).in_steps(8)
    assert (steps["none"], steps["half"]) == (0.0, 0.5)


def test_names_are_no_patterns() -> None:
    torch.manual_seed(0)
    values = {name: torch.randn(4, 8) for name in ("block[0].weight", "block0.weight", "a", "a.weight")}
    shares = {"block[0].weight": 0.25, "a": 0.5, "block0.weight": 0.75, "a.weight": 0.125}
    masks = lrp_prune.select(Relevance(values, statistic="signed"), Budget(shares, dict.fromkeys(shares, 32)))
    assert {name: masks.pruned_in(name) / 32 for name in shares} == shares


def test_sparsity_is_of_what_is_in_it() -> None:
    budget = Budget({"a": 0.25, "b": 0.75}, {"a": 10, "b": 30})
    del budget["b"]
    assert budget.sparsity == 0.25


def test_a_share_that_is_no_step_is_refused_with_the_way_out() -> None:
    relevance = Relevance({"a": torch.randn(4, 8)}, statistic="signed")
    with pytest.raises(ValueError, match=r"no multiple of 1/8.*in_steps\(8\)"):
        lrp_prune.select(relevance, 0.3, "N:8")
    with pytest.raises(ValueError, match="4 does not divide"):
        lrp_prune.select(Relevance({"a": torch.randn(4, 6)}, statistic="signed"), 0.5, "N:4")


def test_the_blocks_of_a_model_share_a_number_and_others_have_their_own() -> None:
    model = build("llama")
    names = [name for name, parameter in model.named_parameters() if parameter.dim() > 1 and "layers" in name]
    blocks = groups_by(model, [*names, "lm_head.weight"], "block")
    assert sorted(name for block in blocks for name in block) == sorted([*names, "lm_head.weight"])
    assert ["lm_head.weight"] in blocks
    for block in blocks:
        assert len({name.split(".")[2] for name in block if "layers" in name}) <= 1
    assert len(groups_by(model, names, "tensor")) == len(names)


def test_what_is_no_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="the share of a"):
        Budget({"a": 1.0}, {"a": 3})
    with pytest.raises(ValueError, match="size of 'b' is not given"):
        Budget({"b": 0.5}, {"a": 3})
    with pytest.raises(ValueError, match="spread must be"):
        spread_around([1.0], [1], 0.5, 1.5)
    with pytest.raises(ValueError, match="more than it can be"):
        spread_around([1.0], [1], 0.995, 0.1)
    with pytest.raises(ValueError, match="not finite"):
        spread_around([float("nan")], [1], 0.5, 0.1)
    with pytest.raises(ValueError, match="by must be"):
        groups_by(nn.Linear(2, 2), ["weight"], "layer")
    with pytest.raises(ValueError, match="no tensor"):
        groups_by(nn.Linear(2, 2), [], "block")
    with pytest.raises(ValueError, match="M of N:M"):
        Budget({"a": 0.5}, {"a": 3}).in_steps(1)


def test_copies_and_pickles_know_the_sizes() -> None:
    budget = Budget({"a": 0.25, "b": 0.75}, {"a": 10, "b": 30})
    for other in (copy.deepcopy(budget), pickle.loads(pickle.dumps(budget))):
        assert other == budget and other.sparsity == budget.sparsity == 0.625
    assert "62.5%" in str(budget)
