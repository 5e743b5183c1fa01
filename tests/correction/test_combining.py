"""Patches with patches: overlap, union, difference, and what cannot be combined."""

import pytest
import torch
from torch import nn

from lrp_prune.correction import Patch
from tests.support.patches import UP, some_patch, unchanged, weights
from tests.support.small_models import build


def test_names_of_two_depths_overlap_in_a_model_and_are_refused_where_they_are_united() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    outer = nn.ModuleDict({"net": net})
    first = Patch.from_positions(outer, {"net.0.weight": torch.tensor([0, 1])})
    second = Patch.from_positions(net, {"0.weight": torch.tensor([1, 2]), "2.bias": torch.tensor([3])})
    assert first.overlap(second) == {}
    assert (first.overlap(second, outer), second.overlap(first, outer)) == ({"net.0.weight": 1}, {"0.weight": 1})
    before = weights(net)
    for united, names in (
        (first | second, ("net.0.weight", "0.weight")),
        (second | first, ("0.weight", "net.0.weight")),
    ):
        with pytest.raises(KeyError, match=f"several depths, '{names[0]}' and '{names[1]}'.* on the same module"):
            united.apply_(outer)
    with pytest.raises(KeyError, match="has no parameter 'absent"):
        Patch({"net.0.weight": first["net.0.weight"], "absent.weight": first["net.0.weight"]}).apply_(outer)
    assert unchanged(net, before)


def test_tied_parameters_overlap_under_any_of_their_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    first = Patch.from_positions(model, {"0.weight": torch.tensor([0, 1])})
    second = Patch.from_positions(model, {"1.weight": torch.tensor([1, 2])})
    assert first.overlap(second) == {}
    assert first.overlap(second, model) == {"0.weight": 1}


def test_union_and_difference() -> None:
    model = build("llama")
    before = weights(model)
    first, second = some_patch(model, 0, behaviour="a"), some_patch(model, 1, behaviour="b")
    shared = Patch.from_positions(model, {UP: torch.cat([first[UP].positions[:3], second[UP].positions[:2]])})
    union, both = first | second, first | second | shared
    assert both == union
    assert union.num_entries == 36 - sum(first.overlap(second).values())
    assert union.behaviour == "a | b"
    union.apply_(model)
    first.revert_(model)
    for name in union:
        zero = set((model.get_parameter(name).view(-1) == 0).nonzero().view(-1).tolist())
        assert zero == set((union - first)[name].positions.tolist())
    (union - first).revert_(model)
    assert unchanged(model, before)
    assert (union - first).overlap(first) == {}
    assert shared.overlap(first) == {UP: 3}
    with pytest.raises(ValueError, match="nothing is left"):
        first - union


def test_intersection() -> None:
    model = build("llama")
    first, second = some_patch(model, 0, behaviour="a"), some_patch(model, 1, behaviour="b")
    shared = Patch.from_positions(model, {UP: torch.cat([first[UP].positions[:3], second[UP].positions[:2]])})
    both = first & shared
    assert both == shared & first and both[UP].positions.tolist() == first[UP].positions[:3].tolist()
    assert both | (first - shared) == first
    assert (first & (first | second)).behaviour == "a & (a | b)" and first & (first | second) == first
    with pytest.raises(ValueError, match="no entry in common"):
        (first - shared) & both
    with pytest.raises(TypeError, match="unsupported operand"):
        first & 1


def test_patches_of_different_models_are_not_combined() -> None:
    model, other = build("llama"), build("llama")
    other.get_parameter(UP).data.view(-1)[0] += 1
    with pytest.raises(ValueError, match=f"unite patches of different models: the checksums of {UP}"):
        some_patch(model) | some_patch(other, 1)
    with pytest.raises(ValueError, match="different models"):
        some_patch(model) - some_patch(build("llama", dtype=torch.bfloat16))
