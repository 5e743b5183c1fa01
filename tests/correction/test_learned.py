"""A condition that a correction learns: where it looks, how seldom it holds elsewhere, and which weights it can act on."""

import pytest
import torch
from torch import nn

from lrp_prune import attribute
from lrp_prune.correction import ActivationAbove, Automatic, Behaviour, ConditionalPatch, Learned, correct, load_patch
from lrp_prune.correction.gating import later_parameters, within_reach
from lrp_prune.effects import Suite
from tests.correction.test_behaviour import OTHERS, PROMPTS, Letters
from tests.support.patches import unchanged, weights
from tests.support.small_models import build

IDS = {"input_ids": torch.arange(6)[None]}


def behaviour() -> Behaviour:
    return Behaviour.from_answers(
        Letters(), [(prompt, "AB") for prompt in PROMPTS], [(prompt, "CD") for prompt in OTHERS], name="ab"
    )


@pytest.mark.slow
def test_a_correction_under_a_condition_is_found_chosen_tested_and_saved(tmp_path) -> None:
    torch.manual_seed(0)
    model = build("llama")
    before = weights(model)
    halves = Suite.halves(Letters(), kinds=["copying"], length=12, samples=8)
    automatic = Automatic(reduction=0.001, allowed=0.5, amounts=(0.002, 0.02), strengths=(1.0,))
    learned = Learned("model.layers.0", allowed={"*": 0.1, "copying": 0.0}, shrinkage=0.1)
    found = correct(model, behaviour(), halves, automatic=automatic, condition=learned, random=1)
    assert unchanged(model, before)
    assert not any(module._forward_hooks for module in model.modules())
    patch = found.patch
    assert isinstance(patch, ConditionalPatch)
    assert patch.condition is found.condition
    assert set(patch) <= set(later_parameters(model, "model.layers.0", IDS))
    assert found.condition.at == "model.layers.0"
    assert set(found.condition.shares) == {"undesired", "copying", "wanted answers"}
    assert found.condition.shares["copying"] == 0
    assert found.condition.shares["wanted answers"] <= 0.1 < found.condition.shares["undesired"]
    # Where the condition holds nowhere nothing has changed: of a kind of text that is given no place at all.
    assert found.effects["copying"].after.value == pytest.approx(found.effects["copying"].before.value, rel=0.05)
    assert found.tested.after.value > found.tested.before.value
    assert "The condition at 'model.layers.0' holds at" in str(found)
    found.save(tmp_path)
    assert load_patch(tmp_path / "patch.safetensors") == patch


def test_without_one_nothing_is_said_of_a_condition() -> None:
    torch.manual_seed(0)
    halves = Suite.halves(Letters(), kinds=["copying"], length=12, samples=4)
    automatic = Automatic(reduction=0.001, allowed=9.0, amounts=(0.02,), strengths=(1.0,))
    found = correct(build("llama"), behaviour(), halves, automatic=automatic, random=0)
    assert found.condition is None
    assert "condition" not in str(found)
    assert not isinstance(found.patch, ConditionalPatch)


def test_what_runs_later_is_found_by_running_it() -> None:
    model = build("llama")
    before = weights(model)
    names = later_parameters(model, "model.layers.0", IDS)
    assert all(name.startswith(("model.layers.1.", "lm_head.")) for name in names)
    assert {name.rsplit(".", 2)[1] for name in names if name.startswith("model.layers.1.")} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert unchanged(model, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    within = later_parameters(model, "model.layers.1.self_attn", IDS)
    assert {name.rsplit(".", 2)[1] for name in within if "layers" in name} == {"gate_proj", "up_proj", "down_proj"}


def test_units_are_within_reach_where_what_reads_them_is() -> None:
    """Of neurons the columns that read them are taken away, so what makes them may run before."""
    model = build("llama")
    relevance = attribute(model, [IDS], "next_token", granularity="neuron")
    later = later_parameters(model, "model.layers.1.mlp.gate_proj", IDS)
    assert not any("gate_proj" in name for name in later)
    assert ["layers.1" in name for name in within_reach(relevance, later, "gate")] == [True]
    with pytest.raises(ValueError, match="nothing that is scored runs after 'gate' only"):
        within_reach(relevance, ["lm_head.weight"], "gate")


def test_a_tied_head_and_layers_that_are_not_linear_are_out_of_reach() -> None:
    model = build("gpt2")
    names = later_parameters(model, "transformer.h.0", IDS)
    assert "transformer.h.1.mlp.c_fc.weight" in names  # a Conv1D
    assert not [name for name in names if "wte" in name or "ln" in name or "h.0." in name]


class Shared(nn.Module):
    """One layer runs before and after the module that is looked at, and an attention runs its projection by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.looked_at, self.once = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, inputs):
        hidden = self.looked_at(self.twice(inputs))
        return self.once(self.twice(self.attention(hidden, hidden, hidden)[0]))


def test_what_runs_earlier_as_well_is_out_of_reach() -> None:
    names = later_parameters(Shared(), "looked_at", {"inputs": torch.ones(1, 3, 4)})
    assert names == ["once.weight", "once.bias"]


def test_where_nothing_can_be_acted_on_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ValueError, match="no linear layer runs after '1' only: look at an earlier module"):
        later_parameters(model, "1", {"input": torch.ones(1, 2)})
    with pytest.raises(KeyError, match="no module 'layers'"):
        later_parameters(model, "layers", {"input": torch.ones(1, 2)})


def test_what_is_said_is_what_is_learned_by() -> None:
    torch.manual_seed(0)
    model, batch = (
        build("llama"),
        {"input_ids": torch.arange(24).reshape(4, 6), "labels": torch.arange(24).reshape(4, 6)},
    )
    other = {"text": [{name: value + 24 for name, value in batch.items()}]}
    for shrinkage, allowed in ((0.1, 0.0), (0.9, 0.25)):
        found = Learned("model.layers.0", allowed, shrinkage).learn(model, [batch], other)
        assert found == ActivationAbove.learned(model, "model.layers.0", [batch], other, allowed, shrinkage)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"allowed": 1.0}, r"allowed must be a number in \[0, 1\), got 1.0"),
        ({"allowed": {"copying": -0.1}}, r"allowed must be a number in \[0, 1\), got -0.1"),
        ({"shrinkage": 0.0}, r"shrinkage must be a number in \(0, 1\], got 0.0"),
    ],
)
def test_what_is_no_share_is_refused_before_anything_is_collected(options, error) -> None:
    with pytest.raises(ValueError, match=error):
        Learned("model.layers.0", **options)
