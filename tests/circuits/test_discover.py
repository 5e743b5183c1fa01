"""Scores against hand-computed values and against the engine, rankings, rounds, and that nothing about the model changes."""

from pathlib import Path

import pytest
import torch
from circuit_tasks import small_task
from planted import PlantedHeads, PlantedNeurons, planted_task
from small_models import build
from torch import nn

import lrp_prune
from lrp_prune import circuits
from lrp_prune.circuits import Circuit, Ranking
from lrp_prune.tasks import TableTask, Task

X, Y, C = [4.0, 2.0, 1.0, 0.0], [0.0, 1.0, 0.0, 3.0], [1.0, 2.0, -1.0, 5.0]


def neurons() -> PlantedNeurons:
    return PlantedNeurons(X, Y, C)


def scores(method: str, **options: object) -> list[float]:
    ranking = circuits.discover(neurons(), planted_task(), method=method, **options)
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
        Product(), planted_task(), method="attribution_patching_ig", steps=4, statistic="signed"
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
        model, planted_task(length=3), circuits.KINDS, method="attribution_patching", statistic="signed"
    )
    found = {name: values.tolist() for name, values in ranking.scores.items()}
    assert found == {
        "attention_block:o": pytest.approx([4 + 2 - 1]),
        "head:o": pytest.approx([4, 2, -1]),
        "attention_neuron:o": pytest.approx([4, 0, 2, 0, -1, 0]),
        "mlp_block:down": pytest.approx([1]),
        "mlp_neuron:down": pytest.approx([1, 0]),
    }


@pytest.mark.parametrize("statistic", ["signed", "abs_token", "abs_sample"])
@pytest.mark.parametrize("composite", ["attnlrp", "cp_lrp", "gradient"])
@pytest.mark.parametrize("granularity", ["head", "neuron"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_units_score_what_the_engine_attributes(name: str, granularity: str, composite: str, statistic: str) -> None:
    model, task = build(name), small_task()
    ranking = circuits.discover(model, task, granularity, composite, statistic=statistic, batch_size=2)
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
        model, task, circuits.KINDS, "attribution_patching", statistic="signed", batch_size=1, unruled="ignore"
    )
    from lrp_prune.circuits.ablation import counterfactual_reference, gating
    from lrp_prune.circuits.sites import passing
    from lrp_prune.tasks.metrics import batch_metric
    from lrp_prune.tasks.task import answer_logits

    slopes = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in ranking.sites}
    for batch in task.batches(1):
        reference = counterfactual_reference(
            lambda batch=batch: answer_logits(model, batch, counterfactual=True), model, ranking.sites
        )
        gates = {site.name: torch.ones(site.units, dtype=torch.float64).requires_grad_() for site in ranking.sites}
        with passing(model), torch.enable_grad(), gating(model, ranking.sites, gates, reference):
            value = batch_metric("logit_difference", answer_logits(model, batch), batch).sum()
        for name_, gradient in zip(gates, torch.autograd.grad(value, list(gates.values())), strict=True):
            slopes[name_] += gradient / len(task)
    for site, slope in slopes.items():
        torch.testing.assert_close(ranking.scores[site].double(), slope, rtol=1e-4, atol=1e-8)


def test_a_signed_ranking_puts_what_hinders_last() -> None:
    model, task = neurons(), planted_task()
    signed = circuits.discover(model, task, method="attribution_patching", ranking="signed")
    assert [node.unit for node in signed.nodes()] == [0, 1, 2, 3]
    absolute = circuits.discover(model, task, method="attribution_patching")
    assert [node.unit for node in absolute.nodes()] == [3, 0, 1, 2]
    with pytest.raises(ValueError, match="no sign"):
        circuits.discover(model, task, ranking="signed", statistic="abs_token")


def test_rounds_score_what_is_left_on_the_ablated_model() -> None:
    # Two redundant neurons through a ReLU that saturates: yes = relu(1 - relu(1 - a - b)): each alone suffices.
    class Redundant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = (
                nn.Embedding(6, 1),
                nn.Linear(1, 3, bias=False),
                nn.Linear(3, 6, bias=False),
            )
            with torch.no_grad():
                self.embed.weight.zero_()
                self.embed.weight[1] = 1.0
                self.up.weight.copy_(torch.tensor([[1.0], [0.9], [0.1]]))
                self.down.weight.zero_()
                self.down.weight[3] = torch.tensor([1.0, 1.0, 1.0])

        def forward(self, input_ids: torch.Tensor, attention_mask: object = None) -> torch.Tensor:
            written = self.down(torch.relu(self.up(self.embed(input_ids))))
            return 1 - torch.relu(1 - written)

    model, task = Redundant(), planted_task()
    once = circuits.discover(model, task, method="attribution_patching")
    assert not any(tensor.any() for tensor in once.scores.values())  # saturated: the gradient vanishes everywhere
    # By activation the redundant ones are dropped one after another; the rest is scored on the ablated model.
    twice = circuits.discover(model, task, method="attribution_patching", rounds=2, floor=0.3)
    # Round 1 drops by position (all tie), and what is left is worth its own activation.
    assert twice.rounds is not None
    left = twice.at(1).nodes()[0].unit
    assert twice.scores["mlp_neuron:down"][left] == pytest.approx([1.0, 0.9, 0.1][left])
    sizes = [twice.at(size).size for size in range(4)]
    assert sizes == [0, 1, 2, 3]


@pytest.mark.parametrize("ablation", ["counterfactual", "mean", "zero"])
@pytest.mark.parametrize("method", ["attnlrp", "attribution_patching", "relp", "attribution_patching_ig"])
def test_a_round_is_one_shot_on_the_ablated_model(method: str, ablation: str) -> None:
    """Under zero ablation the masked model is that model; under interchange methods that run the counterfactual share it."""
    model, task = build("llama"), small_task()
    options = {"statistic": "abs_token", "batch_size": 2, "steps": 2}
    rounds = circuits.discover(model, task, "neuron", method, rounds=2, floor=0.25, ablation=ablation, **options)
    first = circuits.discover(model, task, "neuron", method, **options)
    assert rounds.at(48) == first.at(48)  # of 96 half are left after the first round
    assert rounds.rounds is not None and sum(int((values == 1).sum()) for values in rounds.rounds.values()) == 24
    from lrp_prune.circuits.explaining import Explained
    from lrp_prune.circuits.references import reference_for
    from lrp_prune.circuits.scores import UnitScores

    kept, batches = first.at(48).kept, task.batches(2)
    reference = reference_for(model, first.sites, batches, ablation)
    scores = UnitScores(first.sites, "abs_token")
    for batch in batches:
        composite = "attnlrp" if method in ("attnlrp", "relp") else "gradient"
        explained = Explained(model, first.sites, batch, task, None, composite, "warn", kept, reference(batch))
        scores.add(explained.contributions(method, 2), len(batch["input_ids"]))
    for name, expected in scores.compute().items():
        left = rounds.rounds[name] == 1  # dropped by the scores of the first round's model; the rest was scored again
        torch.testing.assert_close(rounds.scores[name][left], expected[left], rtol=1e-4, atol=1e-8)


def test_circuits_of_a_ranking_are_nested_and_exact() -> None:
    scores_ = {"a": torch.tensor([1.0, 5.0, 2.0]), "b": torch.tensor([9.0, 0.5])}
    rounds = {"a": torch.tensor([2, 0, 1]), "b": torch.tensor([1, 2])}
    ranking = Ranking(scores_, [], "weight", rounds=rounds)
    assert [(node.group, node.unit) for node in ranking.nodes()] == [("a", 0), ("b", 1), ("b", 0), ("a", 2), ("a", 1)]
    before: set[tuple[str, int]] = set()
    for size in range(6):
        kept = {(node.group, node.unit) for node in ranking.at(size).nodes()}
        assert len(kept) == size and before <= kept
        before = kept
    assert ranking.at(0.5).size == 2  # rounded down, as MIB does
    for size in (6, -1, 1.5, True):
        with pytest.raises(ValueError, match="size must be"):
            ranking.at(size)


def test_weights_are_ranked_and_zeroed() -> None:
    model = neurons()
    ranking = circuits.discover(model, planted_task(), "weight", "gradient", rounds=2, floor=0.1)
    assert ranking.granularity == "weight" and set(ranking.scores) == {"up.weight", "down.weight"}
    best = ranking.at(4)
    used = {("up.weight", 1), ("up.weight", 7), ("down.weight", 12), ("down.weight", 13)}  # of the two that add 4
    assert {(node.group, node.unit) for node in best.nodes()} == used
    masks = best.to_masks()
    assert masks.num_entries - masks.num_pruned == 4
    with pytest.raises(ValueError, match="scores units, not weights"):
        circuits.discover(model, planted_task(), "weight", "attribution_patching")


@pytest.mark.parametrize(
    ("granularity", "method"), [("weight", "attnlrp"), ("weight", "wanda"), ("neuron", "wanda"), ("neuron", "attnlrp")]
)
def test_first_tokens_do_not_count(granularity: str, method: str) -> None:
    model, task = build("llama"), small_task()
    totals = [
        sum(float(values.sum()) for values in found.scores.values())
        for found in (circuits.discover(model, task, granularity, method, skip_first=skip) for skip in (0, 1, 100))
    ]
    assert totals[0] > totals[1] > totals[2] == 0


@pytest.mark.parametrize("method", circuits.METHODS)
def test_discovery_changes_nothing(method: str) -> None:
    model = build("llama").train()
    task = small_task()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    circuits.discover(model, task, ["head", "neuron"], method, rounds=2, floor=0.2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        module.training and not module._forward_hooks and not module._forward_pre_hooks for module in model.modules()
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_same_after_an_exception() -> None:
    model = build("llama")
    with pytest.raises(IndexError):
        circuits.discover(model, BrokenTask(small_task().samples), "head")
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


class BrokenTask(TableTask):
    def __init__(self, samples: object) -> None:
        Task.__init__(self, samples, "logit_difference")

    def batches(self, batch_size: int = 16) -> list[dict[str, torch.Tensor]]:
        good = super().batches(batch_size)
        if batch_size == 1:
            return good
        return [*good, {**good[0], "input_ids": good[0]["input_ids"] + 1000}]


def test_rankings_and_circuits_are_saved(tmp_path: Path) -> None:
    ranking = circuits.discover(build("gpt2"), small_task(), ["head", "neuron"], rounds=2, floor=0.2)
    ranking.save(tmp_path / "ranking.safetensors")
    loaded = Ranking.load(tmp_path / "ranking.safetensors")
    assert loaded.at(17) == ranking.at(17) and loaded.description == ranking.description
    circuit = ranking.at(17)
    circuit.save(tmp_path / "circuit.safetensors")
    again = Circuit.load(tmp_path / "circuit.safetensors")
    assert again == circuit and again.sites == circuit.sites and again.description == circuit.description
    with pytest.raises(ValueError, match="ranking"):
        Circuit.load(tmp_path / "ranking.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method must be"),
        ({"granularity": "layer"}, "granularity must be"),
        ({"rounds": 0}, "rounds"),
        ({"floor": 1.0}, "floor must be in"),
        ({"ablation": "noise"}, "ablation must be"),
        ({"normalize": "median"}, "normalize must be"),
        ({"exclude": ["*"]}, "has no mlp_neuron"),
        ({"granularity": "head"}, "has no head"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        circuits.discover(neurons(), planted_task(), **options)
