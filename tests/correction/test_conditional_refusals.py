"""Where a patch under a condition is refused, and how it is kept, copied and combined."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from lrp_prune.correction import (
    ConditionalPatch,
    Patch,
    load_patch,
    patch_of,
)
from tests.support.conditional import AMONG, IDS, activation_condition, logits
from tests.support.conditions import EMBEDDING, Everywhere, TokenIs, last_layer_patch, where_token_is
from tests.support.patches import UP
from tests.support.small_models import build


def test_it_is_saved_and_read_with_its_condition(tmp_path: Path) -> None:
    model = build("llama")
    for patch in (where_token_is(model, AMONG), ConditionalPatch(last_layer_patch(model), activation_condition(model))):
        patch.provenance["strength"] = 0.5
        patch.save(tmp_path / "patch.safetensors")
        for loaded in (
            load_patch(tmp_path / "patch.safetensors"),
            patch_of(pickle.loads(pickle.dumps(patch.state_dict()))),
        ):
            assert isinstance(loaded, ConditionalPatch)
            assert loaded == patch
            assert loaded.provenance["strength"] == 0.5
        with pytest.raises(ValueError, match=r"holds 'lrp_prune\.conditional_patch', expected 'lrp_prune\.patch'"):
            Patch.load(tmp_path / "patch.safetensors")
    plain = last_layer_patch(model)
    plain.save(tmp_path / "plain.safetensors")
    assert type(load_patch(tmp_path / "plain.safetensors")) is Patch
    assert patch != plain
    assert plain != patch


def test_it_is_refused_by_another_model_and_where_it_is_applied_already() -> None:
    model, other = build("llama"), build("llama")
    with torch.no_grad():
        other.get_parameter("model.layers.1.mlp.down_proj.weight").add_(0.01)
    patch = where_token_is(model, AMONG)
    with pytest.raises(ValueError, match="other values than the patch was made for"):
        patch.apply_(other)
    with pytest.raises(KeyError, match="no parameter"):
        patch.apply_(build("gpt2"))
    with pytest.raises(ValueError, match="not applied"):
        patch.revert_(model)
    patch.apply_(model, 0.5)
    with pytest.raises(ValueError, match=r"applied to this model already, at strength 0\.5"):
        patch.apply_(model)
    patch.revert_(model)
    patch.apply_(model)
    assert patch.strength_in(model) == 1


def test_what_cannot_be_conditional_is_refused_before_anything_changes() -> None:
    model = build("llama")
    norm = Patch.from_positions(model, {"model.norm.weight": torch.arange(4)})
    nowhere = ConditionalPatch(last_layer_patch(model), Everywhere("model.layers.9"))
    for patch, error, said in (
        (ConditionalPatch(norm, Everywhere(EMBEDDING)), ValueError, "is of a LlamaRMSNorm"),
        (nowhere, KeyError, "has no module 'model.layers.9'"),
    ):
        with pytest.raises(error, match=said):
            patch.apply_(model)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(TypeError, match="must be a Condition, got str"):
        ConditionalPatch(norm, "loop")
    with pytest.raises(TypeError, match=r"ConditionalPatch\(patch, condition\)"):
        ConditionalPatch.from_positions(model, {"model.norm.weight": torch.arange(4)})


def test_a_layer_that_others_run_is_refused() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention = nn.Identity(), nn.MultiheadAttention(8, 2, batch_first=True)

    model = Attending()
    patch = Patch.from_positions(model, {"attention.out_proj.weight": torch.arange(64)})
    with pytest.raises(ValueError, match=r"attention\.out_proj\.weight is of a layer that is not run by itself"):
        ConditionalPatch(patch, Everywhere("first")).apply_(model)
    assert not model.first._forward_hooks


def test_a_layer_before_the_condition_is_named() -> None:
    model = build("llama")
    early = ConditionalPatch(Patch.from_positions(model, {UP: torch.arange(4)}), activation_condition(model))
    early.apply_(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.up_proj runs before 'model\.layers\.0'"):
            model(input_ids=IDS)


def test_what_a_condition_returns_is_checked() -> None:
    class Wrong(Everywhere):
        name = "test: wrong"

        def holds(self, inputs, output):
            return output.sum(-1)

    model = build("llama")
    ConditionalPatch(last_layer_patch(model), Wrong(EMBEDDING)).apply_(model)
    with pytest.raises(ValueError, match=r"must return bool \[samples\] or \[samples, tokens\], got torch\.float32"):
        model(input_ids=IDS)


def test_a_copy_of_a_model_has_a_patch_of_its_own() -> None:
    model = build("llama")
    clean = logits(model)
    patch = where_token_is(model, AMONG)
    patch.apply_(model)
    corrected = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), corrected)
        patch.revert_(twin)
        assert torch.equal(logits(twin), clean)
    assert torch.equal(logits(model), corrected)


def test_patches_of_one_condition_are_combined_and_others_are_not() -> None:
    model = build("llama")
    first, second = (where_token_is(model, AMONG, seed) for seed in (0, 1))
    plain = first.unconditional()
    both = first | second
    assert both == ConditionalPatch(plain | second.unconditional(), first.condition)
    assert (both - second).unconditional() == plain - second.unconditional()
    other = ConditionalPatch(second.unconditional(), TokenIs(EMBEDDING, [1]))
    for make in (
        lambda: first | other,
        lambda: first - other,
        lambda: plain | first,
        lambda: first | plain,
        lambda: plain - first,
    ):
        with pytest.raises(ValueError, match="different conditions"):
            make()
