"""From circuit to model: by itself it does what ablated evaluation does to it, and pruning and patches can use it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Patch, circuits
from lrp_prune.circuits import Circuit
from lrp_prune.tasks.task import answer_logits
from tests.support.circuit_tasks import small_task
from tests.support.planted import Twice, planted_task
from tests.support.small_models import build

pytestmark = pytest.mark.filterwarnings("ignore:the circuit is evaluated on the prompts")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([answer_logits(model, batch) for batch in small_task().batches()])


def found(model: nn.Module, granularity: str | list[str], size: float = 0.5) -> Circuit:
    return circuits.discover(model, small_task(), granularity, "random", unruled="ignore").at(size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "granularity", "add_biases"),
    [
        ("opt", "neuron", False),
        ("opt", "block", False),
        ("opt", "attention_neuron", False),
        ("gpt2", ["head", "neuron", "block"], False),
        ("llama", ["head", "neuron"], True),
    ],
)
def test_constants_in_biases_are_mean_ablation(name: str, granularity: str | list[str], add_biases: bool) -> None:
    model = build(name)
    circuit = found(model, granularity)
    expected = circuits.evaluate(model, circuit, small_task(), ablation="mean")
    masks = circuits.keep_only_(model, circuit, small_task(), "mean", add_biases=add_biases)
    everything = Circuit({g: torch.ones_like(m) for g, m in circuit.kept.items()}, circuit.sites, circuit.granularity)
    alone = circuits.evaluate(model, [everything, circuit], small_task(), ablation="zero", complements=False)
    for metric in ("logit_difference", "probability_difference"):
        torch.testing.assert_close(alone.full[metric], expected.circuits[metric][:, 0], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(expected.full["logit_difference"], expected.circuits["logit_difference"][:, 0])
    parameters = dict(model.named_parameters())
    assert all(not parameters[key][~masks[key]].any() for key in masks) and masks.num_pruned


def test_a_layer_without_a_bias_is_named_and_nothing_changes() -> None:
    model = build("llama")
    circuit, before = found(model, "neuron"), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj \(Linear\) has no bias.*add_biases=True"):
        circuits.keep_only_(model, circuit, small_task(), "mean")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert circuits.keep_only_(model, circuit).num_pruned  # zero needs none


def test_what_cannot_be_a_model_is_refused() -> None:
    model = build("opt")
    with pytest.raises(ValueError, match="ablation must be 'zero' or 'mean'"):
        circuits.keep_only_(model, found(model, "head"), small_task(), "counterfactual")
    with pytest.raises(ValueError, match="give task="):
        circuits.keep_only_(model, found(model, "head"), ablation="mean")
    with pytest.raises(ValueError, match="use ablation='zero'"):
        circuits.keep_only_(model, circuits.discover(model, small_task(), "weight").at(9), small_task(), "mean")
    twice = Twice()
    circuit = circuits.discover(twice, planted_task(length=2), "neuron").at(3)
    with pytest.raises(ValueError, match=r"mlp\.2 is called 2 times in a forward"):
        circuits.keep_only_(twice, circuit, planted_task(length=2), "mean")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_patch_keeps_only_the_circuit_and_is_undone(name: str, tmp_path: Path) -> None:
    model, other = build(name), build(name)
    circuit, before = found(model, ["head", "neuron"]), logits(model)
    masks = circuits.keep_only_(other, circuit)
    patch = Patch.from_positions(model, {key: ~mask for key, mask in masks.items()}, behaviour="all but the circuit")
    patch.save(tmp_path / "rest.safetensors")
    patch = Patch.load(tmp_path / "rest.safetensors")
    patch.apply_(model)
    assert torch.equal(logits(model), logits(other)) and not torch.equal(before, logits(model))
    patch.revert_(model)
    assert torch.equal(logits(model), before)


def test_the_circuit_itself_can_be_removed_and_undone() -> None:
    model = build("opt")
    circuit = found(model, "neuron", 0.1)
    expected = circuits.evaluate(model, ~circuit, small_task(), ablation="zero").mean("logit_difference")
    patch = Patch.from_positions(model, {name: ~mask for name, mask in (~circuit).to_masks().items()})
    patch.apply_(model)
    everything = Circuit({g: torch.ones_like(m) for g, m in circuit.kept.items()}, circuit.sites, circuit.granularity)
    without = circuits.evaluate(model, [everything, circuit], small_task(), ablation="zero").full["logit_difference"]
    torch.testing.assert_close(without, expected, rtol=1e-4, atol=1e-6)


def test_pruning_goes_on_from_a_circuit() -> None:
    model = build("llama")
    masks = circuits.keep_only_(model, found(model, "neuron"))
    names = list(masks)
    batches = [{"input_ids": batch["input_ids"], "labels": batch["input_ids"]} for batch in small_task().batches()]
    relevance = lrp_prune.attribute(model, batches, "next_token", include=names)
    further = lrp_prune.select(relevance, 0.75, scope="global", existing=masks)
    assert further.sparsity == pytest.approx(0.75, abs=0.01)
    assert all(not (further[name] & ~masks[name]).any() for name in names)
