"""A patch under a condition: what it is where that holds, and that it is nothing anywhere else."""

import pytest
import torch
from torch import nn

import lrp_prune
from lrp_prune.correction import (
    ActivationAbove,
    Automatic,
    ConditionalPatch,
    Patch,
    random_like,
    search_amount,
    side_effects_of,
)
from tests.support.conditional import AMONG, IDS, activation_condition, logits
from tests.support.conditions import EMBEDDING, Everywhere, TokenIs, last_layer_patch, where_token_is
from tests.support.patches import DOWN, unchanged, weights
from tests.support.small_models import build

HELD = torch.isin(IDS, torch.tensor(AMONG))


def test_where_it_holds_nowhere_nothing_is_changed() -> None:
    model = build("llama")
    before, clean = weights(model), logits(model)
    patch = where_token_is(model, [1])
    patch.apply_(model)
    assert torch.equal(logits(model), clean)
    assert unchanged(model, before)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_where_it_holds_layers_run_with_the_patched_weights_and_elsewhere_with_their_own(strength: float) -> None:
    model, static = build("llama"), build("llama")
    before, clean = weights(model), logits(model)
    patch = where_token_is(model, AMONG)
    patch.unconditional().apply_(static, strength)
    patch.apply_(model, strength)
    found = logits(model)
    torch.testing.assert_close(found[HELD], logits(static)[HELD], rtol=1e-5, atol=1e-6)
    assert not torch.equal(found[HELD], clean[HELD])
    assert torch.equal(found[~HELD], clean[~HELD])
    assert patch.strength_in(model) == strength
    assert unchanged(model, before)
    patch.revert_(model)
    assert torch.equal(logits(model), clean)
    assert patch.strength_in(model) == 0
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_condition_on_samples_that_holds_for_all_is_the_patch_itself(name: str) -> None:
    model, static = build(name), build(name)
    layer, weight = (
        ("model.layers.0", DOWN) if name == "llama" else ("transformer.h.0", "transformer.h.1.mlp.c_fc.weight")
    )
    patch = Patch.from_positions(model, {weight: torch.arange(0, model.get_parameter(weight).numel(), 3)})
    conditional = ConditionalPatch(patch, Everywhere(layer))
    patch.apply_(static)
    conditional.apply_(model)
    torch.testing.assert_close(logits(model), logits(static), rtol=1e-5, atol=1e-6)


def test_several_patches_of_one_layer_add_up_and_other_hooks_run_once() -> None:
    model, static = build("llama"), build("llama")
    layer, calls = model.get_submodule("model.layers.1.mlp.up_proj"), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    first = where_token_is(model, AMONG, seed=0)
    second = ConditionalPatch(last_layer_patch(model, seed=1) - first.unconditional(), TokenIs(EMBEDDING, AMONG[1:]))
    (first.unconditional() | second.unconditional()).apply_(static)
    clean = logits(build("llama"))
    for patch in (first, second):
        patch.apply_(model)
    found, both = logits(model), torch.isin(IDS, torch.tensor(AMONG[1:]))
    assert len(calls) == 1
    torch.testing.assert_close(found[both], logits(static)[both], rtol=1e-5, atol=1e-6)
    assert torch.equal(found[~HELD], clean[~HELD])
    first.revert_(model)
    assert second.strength_in(model) == 1
    assert torch.equal(logits(model)[~both], clean[~both])
    second.revert_(model)
    assert torch.equal(logits(model), clean)


def test_a_bias_is_corrected_too() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 2))
    patch = Patch.from_positions(model, {"1.bias": torch.tensor([1]), "1.weight": torch.tensor([0, 4])})
    inputs = torch.randn(4, 3)
    conditional = ConditionalPatch(patch, ActivationAbove("0", 0.0, torch.tensor([1.0, 0.0, 0.0])))
    clean = model(inputs)
    conditional.apply_(model)
    found = model(inputs)
    conditional.revert_(model)
    patch.apply_(model)
    held = inputs[:, 0] > 0
    torch.testing.assert_close(found, torch.where(held[:, None], model(inputs), clean))


@pytest.mark.slow
def test_generation_with_a_cache_is_that_without() -> None:
    model = build("llama")
    # Keys and values of later tokens see what a corrected one has left.
    names = [f"model.layers.1.{name}.weight" for name in ("self_attn.v_proj", "self_attn.k_proj", "mlp.down_proj")]
    whole_layers = {name: torch.arange(model.get_parameter(name).numel()) for name in names}
    patch = ConditionalPatch(Patch.from_positions(model, whole_layers), activation_condition(model))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    clean = model.generate(IDS, **options)
    patch.apply_(model)
    cached, whole = (model.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, clean)
    beams = [model.generate(IDS, use_cache=use, num_beams=3, **options) for use in (True, False)]
    assert torch.equal(*beams)


def test_samples_of_a_batch_do_not_see_each_other_and_padding_changes_nothing() -> None:
    model = build("llama")
    patch = ConditionalPatch(last_layer_patch(model), activation_condition(model))
    patch.apply_(model)
    together = logits(model)
    for row in range(len(IDS)):
        torch.testing.assert_close(logits(model, IDS[row : row + 1]), together[row : row + 1], rtol=1e-4, atol=1e-5)
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.int64), IDS], 1)
    mask = (padded != 0).long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(input_ids=padded, attention_mask=mask, position_ids=places).logits[:, 4:]
    torch.testing.assert_close(found, together, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_weights_that_were_run() -> None:
    model, static = build("llama"), build("llama")
    patch = ConditionalPatch(last_layer_patch(model), Everywhere(EMBEDDING))
    patch.unconditional().apply_(static, 0.25)
    patch.apply_(model, 0.25)
    for each in (model, static):
        each(input_ids=IDS).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        expected = static.get_parameter(name).grad
        if name in patch:
            factor = torch.ones_like(expected).view(-1)
            factor[patch[name].positions] = 0.75
            expected = expected * factor.view_as(expected)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_relevance_of_inputs_is_that_of_the_patched_model_where_it_holds() -> None:
    model, static = build("llama"), build("llama")
    patch = ConditionalPatch(last_layer_patch(model), Everywhere(EMBEDDING))
    patch.unconditional().apply_(static)
    patch.apply_(model)
    found = []
    for each in (model, static):
        with lrp_prune.attributing(each) as propagation:
            target = each(input_ids=IDS).logits[:, -1].amax(-1).sum()
            found.append(next(iter(propagation.relevance(target).values())))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo does not know")
@pytest.mark.parametrize("how", ["around", "call", "forward"])
def test_models_that_were_compiled_and_run_before_are_corrected(how: str) -> None:
    model, inputs = nn.Sequential(nn.Identity(), nn.Linear(8, 4, bias=False)), torch.randn(3, 8)
    inputs[:, 0] = torch.tensor([1.0, -1.0, 1.0])
    patch = Patch.from_positions(model, {"1.weight": torch.arange(32)})
    conditional = ConditionalPatch(patch, ActivationAbove("0", 0.0, torch.eye(8)[0]))
    run: nn.Module = model
    if how == "around":
        run = torch.compile(model, backend="eager")
    elif how == "call":
        model.compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    before = run(inputs)
    for _ in range(2):
        conditional.apply_(model)
        torch.testing.assert_close(run(inputs), before.masked_fill((inputs[:, :1] > 0), 0.0))
        conditional.revert_(model)
        assert torch.equal(run(inputs), before)


@pytest.mark.slow
def test_it_is_measured_and_searched_as_any_patch() -> None:
    model = build("llama")
    before = weights(model)
    patch = where_token_is(model, AMONG)
    suite = {"held": IDS[:, :6], "not held": torch.full((2, 6), 1)}
    effects = side_effects_of(patch, model, suite, 1.0, random=2, progress=False)
    assert effects["not held"].change.value == 0
    assert effects["held"].change.value != 0
    assert patch.provenance["side_effects"]["strength"] == 1.0
    random = random_like(patch, model)
    assert isinstance(random, ConditionalPatch)
    assert random.condition == patch.condition
    found = search_amount(
        model,
        lambda count: ConditionalPatch(last_layer_patch(model, entries=count), patch.condition),
        lambda corrected: float((logits(corrected) == logits(build("llama"))).all(-1).float().mean()),
        {"not held": lambda corrected: float(logits(corrected, torch.full((2, 6), 1)).square().mean())},
        automatic=Automatic(reduction=0.1, amounts=[10, 300]),
    )
    assert isinstance(found.patch, ConditionalPatch)
    assert all(trial.losses["not held"] == 0 for trial in found.curve)
    assert unchanged(model, before)
    assert patch.strength_in(model) == 0
