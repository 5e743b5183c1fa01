"""Scores of each method against hand-computed values, derivatives and the engine."""

import pytest
import torch
from torch import nn

import lrp_prune
from lrp_prune import circuits
from lrp_prune.circuits import Ranking
from lrp_prune.circuits.ablation import ABLATIONS, gating
from lrp_prune.circuits.references import reference_for
from lrp_prune.circuits.sites import passing
from lrp_prune.tasks import Task
from lrp_prune.tasks.metrics import batch_metric
from lrp_prune.tasks.task import answer_logits
from tests.support.circuit_tasks import chosen, small_task
from tests.support.planted import PlantedHeads, PlantedNeurons, Redundant, planted_task
from tests.support.small_models import build

X, Y, C = [4.0, 2.0, 1.0, 0.0], [0.0, 1.0, 0.0, 3.0], [1.0, 2.0, -1.0, 5.0]


def scores(method: str, **options: object) -> list[float]:
    ranking = circuits.discover(PlantedNeurons(X, Y, C), planted_task(), method=chosen(method, **options))
    return ranking.scores["mlp_neuron:down"].tolist()


@pytest.mark.parametrize("method", ["attnlrp", "cp_lrp", "gradient"])
def test_relevance_of_planted_neurons(method: str) -> None:
    assert scores(method) == pytest.approx([4, 4, 1, 0])
    assert scores(method, statistic="signed") == pytest.approx([4, 4, -1, 0])


@pytest.mark.parametrize("method", ["attribution_patching", "relp"])
def test_patching_scores_are_the_differences_effects(method: str) -> None:
    # The fourth neuron is off in the clean prompt: the clean gradient of the rule "f(x) / x" and of ReLU is 0 before it, but
    # not at its output, where units are.
    assert scores(method, statistic="signed") == pytest.approx([4, 2, -1, -15])


def test_integrated_gradients_average_over_the_path() -> None:
    # Two layers: the gate of the second neuron depends on the first, so that the gradient changes along the path.
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = (
                nn.Embedding(6, 2),
                nn.Linear(2, 2, bias=False),
                nn.Linear(2, 6, bias=False),
            )
            with torch.no_grad():
                self.embed.weight.zero_()
                self.embed.weight[1], self.embed.weight[2] = torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])
                self.up.weight.copy_(torch.eye(2))
                self.down.weight.zero_()
                self.down.weight[3, 0] = 1.0

        def forward(self, input_ids: torch.Tensor, attention_mask: object = None) -> torch.Tensor:
            return self.down(torch.relu(self.up(self.embed(input_ids)))).square()

    # m = a^2 with a from 1 (counterfactual) to 3: (a - a') mean of 2 a over the four points 1.5, 2, 2.5, 3.
    ranking = circuits.discover(
        Product(), planted_task(), method=chosen("attribution_patching_ig", steps=4, statistic="signed")
    )
    assert ranking.scores["mlp_neuron:down"].tolist() == pytest.approx([2 * 2 * (1.5 + 2 + 2.5 + 3) / 4, 0])


def test_activation_wanda_and_random() -> None:
    assert scores("activation") == pytest.approx([4, 2, 1, 0])
    # |W| |a|, over two samples of one token: the norm over tokens, averaged as scorers do.
    wanda = torch.tensor(scores("wanda"))
    assert torch.allclose(wanda / wanda[0], torch.tensor([1.0, 1.0, 0.25, 0.0]))
    assert scores("random", seed=1) == scores("random", seed=1) != scores("random", seed=2)


def test_heads_channels_and_blocks_by_hand() -> None:
    model = PlantedHeads([4.0, 2.0, 1.0], [0.0, 1.0, 0.0], [1.0, 2.0, -1.0])
    ranking = circuits.discover(
        model, planted_task(length=3), circuits.NODE_KINDS, method=chosen("attribution_patching", statistic="signed")
    )
    found = {name: values.tolist() for name, values in ranking.scores.items()}
    assert found == {
        "attention_block:o": pytest.approx([4 + 2 - 1]),
        "head:o": pytest.approx([4, 2, -1]),
        "attention_neuron:o": pytest.approx([4, 0, 2, 0, -1, 0]),
        "mlp_block:down": pytest.approx([1]),
        "mlp_neuron:down": pytest.approx([1, 0]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("statistic", ["signed", "abs_token", "abs_sample"])
@pytest.mark.parametrize("composite", ["attnlrp", "cp_lrp", "gradient"])
@pytest.mark.parametrize("granularity", ["head", "neuron"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_units_score_what_the_engine_attributes(name: str, granularity: str, composite: str, statistic: str) -> None:
    model, task = build(name), small_task()
    ranking = circuits.discover(model, task, granularity, chosen(composite, statistic=statistic), batch_size=2)
    relevance = lrp_prune.attribute(
        model, task.batches(2), task.target(), composite, statistic, granularity, unruled="ignore"
    )
    kind = {"neuron": "mlp_neuron"}.get(granularity, granularity)
    assert [f"{kind}:{group}" for group in relevance] == list(ranking.scores)
    for group, values in relevance.items():
        torch.testing.assert_close(ranking.scores[f"{kind}:{group}"], values, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "qwen3"])
def test_attribution_patching_is_the_derivative_of_the_ablation(name: str) -> None:
    """The score of a unit is the slope of the metric as its gate moves, an independent computation."""
    model, task = build(name).double(), small_task()
    ranking = circuits.discover(
        model,
        task,
        circuits.NODE_KINDS,
        chosen("attribution_patching", statistic="signed"),
        batch_size=1,
        unruled="ignore",
    )
    expected = slopes(model, task, ranking, "counterfactual", 1.0)
    for site, slope in expected.items():
        torch.testing.assert_close(ranking.scores[site].double(), slope, rtol=1e-4, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "qwen3"])
def test_gradients_over_gates_are_the_derivative_half_way(name: str, ablation: str) -> None:
    model, task = build(name).double(), small_task()
    kinds = ["block", "head", "neuron"]
    options = {"batch_size": 1, "ablation": ablation, "unruled": "ignore"}
    ranking = circuits.discover(model, task, kinds, chosen("gate_ig", statistic="signed"), **options)
    assert ranking.description["ablation"] == ablation and ranking.description["steps"] == 1
    for site, slope in slopes(model, task, ranking, ablation, 0.5).items():
        torch.testing.assert_close(ranking.scores[site].double(), slope, rtol=1e-4, atol=1e-8)


def slopes(model: nn.Module, task: Task, ranking: Ranking, ablation: str, gate: float) -> dict[str, torch.Tensor]:
    """The derivative of the logit difference by each unit's gate, where all gates have one value."""
    batches = task.batches(1)
    reference = reference_for(model, ranking.sites, batches, ablation)
    total = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in ranking.sites}
    for batch in batches:
        gates = {name: torch.full_like(values, gate).requires_grad_() for name, values in total.items()}
        with passing(model), torch.enable_grad(), gating(model, ranking.sites, gates, reference(batch)):
            value = batch_metric("logit_difference", answer_logits(model, batch), batch).sum()
        for name, gradient in zip(gates, torch.autograd.grad(value, list(gates.values())), strict=True):
            total[name] += gradient / len(task)
    return total


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the circuit is evaluated on the prompts it was found on")
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_over_gates_add_up_to_what_the_ablation_changes(name: str, ablation: str) -> None:
    """Completeness of integrated gradients: all scores together are the full model less the empty circuit."""
    model, task = build(name).double(), small_task()
    options = {"ablation": ablation, "unruled": "ignore"}
    methods = [chosen("gate_ig", statistic="signed", steps=n) for n in (2, 4, 32)]
    found = [circuits.discover(model, task, ["head", "neuron"], method, **options) for method in methods]
    result = circuits.evaluate(model, found[0], task, [0, 1.0], ablation, seeds=None, complements=False)
    changed = float(result.full["logit_difference"] - result.empty["logit_difference"])
    errors = [abs(sum(float(values.sum()) for values in one.scores.values()) - changed) for one in found]
    assert errors[2] < 0.005 * abs(changed) and errors[2] < errors[1] < errors[0]


def test_gradients_over_gates_see_what_is_redundant() -> None:
    ranking = circuits.discover(Redundant(), planted_task(), method=chosen("gate_ig", steps=2, statistic="signed"))
    # At a quarter open a + b + c = 0.5, the slope of each is its own activation; at three quarters 1.5 and saturated.
    assert ranking.scores["mlp_neuron:down"].tolist() == pytest.approx([0.5, 0.45, 0.05])
