"""Sites are found by tracing in many architectures, in modules that run twice, and what has none is said."""

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrp_prune import circuits
from lrp_prune.circuits.ablation import counterfactual_reference, gating, mean_reference
from lrp_prune.circuits.sites import passing
from lrp_prune.tasks.task import answer_logits
from tests.support.circuit_tasks import chosen, small_task
from tests.support.planted import PlantedNeurons, Twice, planted_task
from tests.support.small_models import CAUSAL, build


@pytest.mark.parametrize("name", [*(name for name in CAUSAL if name != "mixtral"), "bloom"])
def test_every_kind_is_found_in_every_layer(name: str) -> None:
    task = small_task()
    sites = circuits.find_sites(build(name), task.batches(1)[0], circuits.NODE_KINDS, task.target())
    assert [site.kind for site in sites] == list(
        ["attention_block", "head", "attention_neuron", "mlp_block", "mlp_neuron"] * 2
    )
    assert [(site.units, site.width) for site in sites[:4]] == [(1, 0), (4, 8), (32, 1), (1, 0)]


@pytest.mark.slow
def test_experts_have_no_units_and_are_named() -> None:
    model, task = build("mixtral"), small_task()
    for granularity in ("block", "neuron", ["head", "neuron"]):
        with pytest.raises(
            ValueError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj holds .* several experts.*'weight'"
        ):
            circuits.find_sites(model, task.batches(1)[0], granularity, task.target())
    assert len(circuits.find_sites(model, task.batches(1)[0], ["head", "attention_block"], task.target())) == 4
    assert circuits.discover(model, task, "weight", "gradient").at(0.1).size  # as the error says


def test_experts_beside_ordinary_layers_are_told_of() -> None:
    model, task = build("mixtral"), small_task()
    model.model.layers[0].mlp = build("llama").model.layers[0].mlp
    with pytest.warns(UserWarning, match=r"layers\.1\.mlp\.experts\.gate_up_proj .* never ablated"):
        (site,) = circuits.find_sites(model, task.batches(1)[0], "neuron", task.target())
    assert site.name == "mlp_neuron:model.layers.0.mlp.down_proj"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        circuits.find_sites(model, task.batches(1)[0], "neuron", task.target(), exclude=["*.experts.*"])


class Filtered(nn.Module):
    """A language model that mixes neighbouring positions, each channel by itself, and has no hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)
        self.filters = nn.Conv1d(8, 8, 3, padding=2, groups=8)

    def forward(self, input_ids: Tensor, attention_mask: object = None) -> Tensor:
        x = self.embed(input_ids)
        return self.head(x + self.filters(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))


def test_filters_of_a_convolution_are_no_experts() -> None:
    task = small_task()
    with pytest.raises(ValueError, match="Filtered has no mlp_neuron that the target depends on") as error:
        circuits.find_sites(Filtered(), task.batches(1)[0], "neuron", task.target())
    assert "experts" not in str(error.value)


class CutOff(nn.Module):
    """A part of a model whose output is a constant."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.part(*args, **kwargs)
        return output.detach() if isinstance(output, Tensor) else (output[0].detach(), *output[1:])


@pytest.mark.parametrize(
    ("part", "granularity", "reader"), [("mlp", "neuron", "down_proj"), ("self_attn", "head", "o_proj")]
)
def test_units_that_are_cut_off_are_told_from_units_that_are_not_there(
    part: str, granularity: str, reader: str
) -> None:
    model, task = build("llama"), small_task()
    for layer in model.model.layers:
        setattr(layer, part, CutOff(getattr(layer, part)))
    expected = (
        rf"has no \w+ that the target depends on: .* does not depend on "
        rf"model\.layers\.\*\.{part}\.part\.{reader}"
    )
    with pytest.raises(ValueError, match=expected):
        circuits.find_sites(model, task.batches(1)[0], granularity, task.target())


@pytest.mark.slow
def test_patterns_choose_layers() -> None:
    model, task = build("llama"), small_task()
    ranking = circuits.discover(model, task, circuits.NODE_KINDS, include=["model.layers.1.*"])
    assert len(ranking.scores) == 5 and all("layers.1." in name for name in ranking.scores)
    ranking = circuits.discover(model, task, circuits.NODE_KINDS, exclude=["*.mlp"])
    assert {name.partition(":")[0] for name in ranking.scores} == {"attention_block", "head", "attention_neuron"}


def test_a_layer_that_runs_twice_is_interchanged_call_by_call() -> None:
    model, task = Twice(), planted_task(length=2)
    (batch,) = task.batches()
    ranking = circuits.discover(model, task, "neuron", chosen("attribution_patching", statistic="signed"))
    reference = counterfactual_reference(lambda: answer_logits(model, batch, counterfactual=True), model, ranking.sites)
    (tensors,) = reference.values()
    assert len(tensors) == 2 and not torch.equal(tensors[0], tensors[1])
    gate = torch.ones(7).requires_grad_()
    with passing(model), torch.enable_grad(), gating(model, ranking.sites, {ranking.sites[0].name: gate}, reference):
        logits = answer_logits(model, batch)
        value = (logits[:, 3] - logits[:, 4]).sum()
    (slope,) = torch.autograd.grad(value, gate)
    torch.testing.assert_close(ranking.scores[ranking.sites[0].name], slope / len(task))


def test_means_are_over_samples_and_positions_of_all_prompts() -> None:
    model, task = build("gpt2"), small_task()
    sites = circuits.discover(model, task, "neuron").sites
    batches = task.batches(1)
    runs = [lambda batch=batch: answer_logits(model, batch, counterfactual=True) for batch in batches]
    means = mean_reference(runs, model, sites)
    for place, (mean,) in means.items():
        rows = [counterfactual_reference(run, model, sites)[place][0].reshape(-1, 128) for run in runs]
        torch.testing.assert_close(mean.float(), torch.cat(rows).mean(0))


def test_first_tokens_can_be_left_out_and_groups_normalised() -> None:
    model = PlantedNeurons([4.0, 2.0], [0.0, 1.0], [1.0, 2.0])
    whole = circuits.discover(model, planted_task(length=1), method="activation")
    skipped = circuits.discover(model, planted_task(length=1), method=chosen("activation", skip_first=1))
    assert whole.scores["mlp_neuron:down"].tolist() == [4, 2] and not skipped.scores["mlp_neuron:down"].any()
    normalised = circuits.discover(model, planted_task(), method="activation", normalize="mean")
    assert normalised.scores["mlp_neuron:down"].tolist() == pytest.approx([4 / 3, 2 / 3])


@pytest.mark.slow
def test_circuits_are_imported_without_lightning_and_matplotlib() -> None:
    check = "import sys, lrp_prune.circuits, lrp_prune.tasks; assert not {'lightning', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)
