"""Taking neurons out of experts that are stacked in one weight: as many of each."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lrp_prune
from lrp_prune.relevance import Relevance
from tests.support.small_models import batch_for, build

EXPERTS, WIDTH = 4, 48


def batches() -> list[dict[str, Tensor]]:
    return [batch_for("mixtral", 3, 9)]


def masked(model: nn.Module, dead: Any) -> lrp_prune.Masks:
    """Masks of the neurons that a function of layer, expert and channel names."""
    relevance = lrp_prune.attribute(model, batches(), "next_token", granularity="neuron")
    values = {
        name: torch.tensor([[float(not dead(layer, e, c)) for c in range(WIDTH)] for e in range(EXPERTS)]).flatten()
        for layer, name in enumerate(relevance)
    }
    wanted = Relevance(
        values, granularity="neuron", members=relevance.members, parameter_shapes=relevance.parameter_shapes
    )
    number = sum(int((each == 0).sum()) for each in values.values())
    masks = lrp_prune.select(wanted, number / sum(map(len, values.values())), scope="global")
    masks.apply_(model)
    return masks


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.named_parameters() if "experts" in name}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_as_many_neurons_of_each_expert_go_and_outputs_stay(name: str) -> None:
    model = build(name)
    masks = lrp_prune.prune(model, batches(), 0.25, granularity="neuron", scope="layer", recalibrate=False)
    expected = model(**batches()[0]).logits
    shrunk = lrp_prune.shrink(model, masks, batches())
    assert shrunk.taken == 2 * EXPERTS * 12 and not shrunk.left
    torch.testing.assert_close(model(**batches()[0]).logits, expected, rtol=1e-4, atol=1e-6)
    for weight, shape in shapes(model).items():
        if "gate_up" in weight:
            assert 2 * 36 in shape
        elif not weight.endswith("bias"):
            assert 36 in shape and 48 not in shape


def test_what_is_left_are_each_experts_own_neurons() -> None:
    """Another number of each is dead: what is beyond the fewest stays, as zeros, and is told."""
    model = build("mixtral")
    masks = masked(model, lambda layer, expert, channel: channel % 4 == expert and (expert == 0 or channel < 32))
    dense = copy.deepcopy(model)
    shrunk = lrp_prune.shrink(model, masks, batches())
    assert shrunk.taken == 2 * EXPERTS * 8
    assert any("of which the same number of channels goes" in why for why in shrunk.left.values())
    for layer in range(2):
        ours, theirs = (each.model.layers[layer].mlp.experts for each in (model, dense))
        for expert in range(EXPERTS):
            gone = [channel for channel in range(WIDTH) if channel % 4 == expert and (expert == 0 or channel < 32)][:8]
            left = [channel for channel in range(WIDTH) if channel not in gone]
            assert torch.equal(ours.down_proj[expert], theirs.down_proj[expert][:, left])
            rows = [*left, *(WIDTH + channel for channel in left)]
            assert torch.equal(ours.gate_up_proj[expert], theirs.gate_up_proj[expert][rows])


def test_of_an_expert_that_is_dead_one_neuron_stays() -> None:
    model = build("mixtral")
    masks = masked(model, lambda layer, expert, channel: expert == 2 or channel >= 4)
    expected = model(**batches()[0]).logits
    lrp_prune.shrink(model, masks, batches())
    assert {shape[-1] for weight, shape in shapes(model).items() if "down" in weight} == {4}
    torch.testing.assert_close(model(**batches()[0]).logits, expected, rtol=1e-4, atol=1e-6)


def test_nothing_goes_where_an_expert_has_nothing_dead() -> None:
    model = build("mixtral")
    masks = masked(model, lambda layer, expert, channel: expert != 1 and channel < 8)
    with pytest.raises(ValueError, match="of which the same number of channels goes"):
        lrp_prune.shrink(model, masks, batches())
    assert all(WIDTH in shape or 2 * WIDTH in shape for shape in shapes(model).values())


def test_uniform_counts_each_expert_and_a_configuration_says_it(tmp_path: Path) -> None:
    model = build("mixtral")
    masks = masked(model, lambda layer, expert, channel: channel < (16 if layer else 8 + expert))
    shrunk = lrp_prune.shrink(model, masks, batches(), uniform=True)
    assert model.config.intermediate_size == 40
    shrunk.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**batches()[0]).logits, model(**batches()[0]).logits, rtol=1e-4, atol=1e-6)


def test_a_multiple_is_of_each_expert() -> None:
    model = build("mixtral")
    masks = masked(model, lambda layer, expert, channel: channel < 10)
    lrp_prune.shrink(model, masks, batches(), multiple_of=8)
    assert {shape[-1] for weight, shape in shapes(model).items() if "down" in weight} == {40}


def test_layers_of_different_sizes_are_loaded_from_their_shapes(tmp_path: Path) -> None:
    model = build("mixtral")
    masks = masked(model, lambda layer, expert, channel: channel < (16 if layer else 8))
    lrp_prune.shrink(model, masks, batches()).save(tmp_path)
    again = build("mixtral")
    lrp_prune.load_shrunk(tmp_path, again)
    torch.testing.assert_close(again(**batches()[0]).logits, model(**batches()[0]).logits, rtol=1e-4, atol=1e-6)


def test_by_layer_each_expert_loses_as_many_neurons() -> None:
    model = build("mixtral")
    relevance = lrp_prune.attribute(model, batches(), "next_token", granularity="neuron")
    masks = lrp_prune.select(relevance, 0.25, scope="layer")
    other = lrp_prune.select(relevance, 0.25, scope="global")
    for name in relevance:
        by_expert = [(~masks[name][expert]).all(0).sum() for expert in range(EXPERTS)]
        assert by_expert == [12] * EXPERTS
        values = relevance[name].reshape(EXPERTS, WIDTH)
        for expert in range(EXPERTS):
            gone = (~masks[name][expert]).all(0)
            assert values[expert][gone].max() <= values[expert][~gone].min()
    assert len({int((~other[name][expert]).all(0).sum()) for name in relevance for expert in range(EXPERTS)}) > 1
    rounds = lrp_prune.select(relevance, 0.5, scope="layer", existing=masks)
    assert all(not (rounds[name] & ~masks[name]).any() for name in masks)
