"""What a patch does besides, beside random entries; and that it is kept in the patch's description."""

import math

import pytest
import torch
from torch import nn

from lrp_prune.correction import Patch, random_like, side_effects_of
from lrp_prune.metrics import SideEffectError, SideEffects, Suite, side_effects
from tests.support.patches import DOWN, UP, some_patch, unchanged, weights
from tests.support.small_models import build

TOKENS = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(5))
SUITE = {"first": TOKENS[:2], "second": TOKENS[2:]}


def test_the_change_is_that_of_the_applied_patch() -> None:
    model, corrected = build("llama"), build("llama")
    before = weights(model)
    patch = some_patch(model, behaviour="example")
    patch.apply_(corrected, 0.5)
    expected = side_effects(model, corrected, SUITE, progress=False)
    found = side_effects_of(patch, model, SUITE, 0.5, random=2, progress=False)
    for name in SUITE:
        assert found[name].change == expected[name].change
        assert found[name].change.value != 0
        assert found[name].divergence == expected[name].divergence
    assert unchanged(model, before)


def test_random_entries_are_as_many_of_each_parameter() -> None:
    model = build("llama")
    patch = some_patch(model)
    first, again, other = (random_like(patch, model, seed) for seed in (1, 1, 2))
    assert {name: len(first[name].positions) for name in first} == {UP: 9, DOWN: 9}
    assert first == again
    assert first != other
    assert first != patch
    most = Patch.from_positions(model, {UP: torch.arange(32 * 48 - 1)})
    assert random_like(most, model).num_entries == 32 * 48 - 1


def test_random_entries_are_measured_at_the_same_strength() -> None:
    model, corrected = build("llama"), build("llama")
    patch = some_patch(model)
    patch.provenance["strength"] = 0.25
    found = side_effects_of(patch, model, SUITE, random=2, seed=7, progress=False)
    changes = []
    for number in range(2):
        other = random_like(patch, corrected, 7 + number)
        other.apply_(corrected, 0.25)
        changes.append(side_effects(model, corrected, SUITE, progress=False)["first"].change.value)
        other.revert_(corrected)
    assert found["first"].beside["random weights"] == changes
    assert len(set(changes)) == 2
    without = side_effects_of(patch, model, SUITE, random=0, progress=False)
    assert without["first"].beside == {}


def test_the_description_keeps_what_was_found_the_limits_and_the_verdict(tmp_path) -> None:
    model = build("llama")
    patch = some_patch(model, behaviour="example")
    found = side_effects_of(
        patch, model, Suite(SUITE, missing={"third": "not there"}), random=1, allowed=10.0, progress=False
    )
    patch.save(tmp_path / "patch.safetensors")
    kept = Patch.load(tmp_path / "patch.safetensors").provenance["side_effects"]
    assert str(SideEffects.from_dict(kept)) == str(found)
    assert (kept["strength"], kept["allowed"], kept["within"]) == (1.0, {"*": 10.0}, True)
    assert kept["missing"] == {"third": "not there"}
    assert kept["verdict"].startswith("the patch against 'example' is within its limits")
    assert kept["suite"] == Suite(SUITE).fingerprint


def test_a_patch_that_harms_a_text_is_refused_with_the_text_named() -> None:
    """A model that can say two things: the patch takes away one of them."""
    model = nn.Sequential(nn.Embedding(2, 2), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[1].weight.copy_(4 * torch.eye(2))
    texts = {"zeros": torch.zeros(2, 6, dtype=torch.int64), "ones": torch.ones(2, 6, dtype=torch.int64)}
    patch = Patch.from_positions(model, {"1.weight": torch.tensor([3])}, behaviour="ones")
    found = side_effects_of(patch, model, texts, random=0, progress=False)
    assert found["zeros"].change.value == 0
    expected = 2 / (1 + math.exp(-4)) - 1
    assert found["ones"].change.value == pytest.approx(expected, rel=1e-5)
    with pytest.raises(SideEffectError, match=r"changes 'ones' by \+96"):
        found.check()
    assert not patch.provenance["side_effects"]["within"]
    assert "'ones'" in patch.provenance["side_effects"]["verdict"]
    found.check({"*": 0.02, "ones": 1.0})


def test_a_patch_that_is_applied_or_of_another_model_is_refused() -> None:
    model = build("llama")
    patch = some_patch(model)
    patch.apply_(model, 0.5)
    with pytest.raises(ValueError, match="applied to this model already"):
        side_effects_of(patch, model, SUITE, progress=False)
    patch.revert_(model)
    with pytest.raises(ValueError, match="strength must be"):
        side_effects_of(patch, model, SUITE, 2.0, progress=False)
    never = {"mine": lambda _: pytest.fail("measured for nothing")}
    with pytest.raises(ValueError, match=r"'copying'.* matches none of mine"):
        side_effects_of(patch, model, never, allowed={"copying": 0.1}, progress=False)
    with pytest.raises(ValueError, match="random must be an integer of at least 0, got -1"):
        side_effects_of(patch, model, never, random=-1, progress=False)
    before = weights(model)

    def failing(_: nn.Module) -> torch.Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="'mine': no"):
        side_effects_of(patch, model, {"first": TOKENS, "mine": failing}, progress=False)
    assert unchanged(model, before)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[5, 5] += 1
    with pytest.raises(ValueError, match=r"differs elsewhere|other values"):
        side_effects_of(patch, model, SUITE, progress=False)
