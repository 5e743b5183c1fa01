"""Discovery: rankings, rounds, files, and that nothing about the model changes."""

from pathlib import Path

import pytest
import torch

from lrp_prune import circuits
from lrp_prune.circuits import Circuit, Ranking
from lrp_prune.circuits.ablation import ABLATIONS
from lrp_prune.circuits.discover import _normalized
from lrp_prune.circuits.explaining import Explained
from lrp_prune.circuits.methods import way_of
from lrp_prune.circuits.references import reference_for
from lrp_prune.circuits.scores import UnitScores
from lrp_prune.pruning import LRP, Magnitude, Method, Scorable, prune
from lrp_prune.tasks import TableTask, Task
from tests.support.circuit_tasks import chosen, small_task
from tests.support.planted import PlantedNeurons, Redundant, planted_task
from tests.support.small_models import build


def neurons() -> PlantedNeurons:
    return PlantedNeurons([4.0, 2.0, 1.0, 0.0], [0.0, 1.0, 0.0, 3.0], [1.0, 2.0, -1.0, 5.0])


def test_a_signed_ranking_puts_what_hinders_last() -> None:
    model, task = neurons(), planted_task()
    signed = circuits.discover(model, task, method="attribution_patching", order="signed")
    assert [node.unit for node in signed.nodes()] == [0, 1, 2, 3]
    absolute = circuits.discover(model, task, method="attribution_patching")
    assert [node.unit for node in absolute.nodes()] == [3, 0, 1, 2]
    with pytest.raises(ValueError, match="no sign"):
        circuits.discover(model, task, method=chosen("gate_ig", statistic="abs_token"), order="signed")


@pytest.mark.parametrize(("granularity", "method"), [("neuron", "gate_ig"), ("weight", "attnlrp")])
def test_the_default_is_what_ranks_best(granularity: str, method: str) -> None:
    found = circuits.discover(neurons(), planted_task(), granularity)
    asked = circuits.discover(neurons(), planted_task(), granularity, method)
    assert found.description == asked.description and found.description["method"] == method
    assert all(torch.equal(values, asked.scores[name]) for name, values in found.scores.items())


def test_rounds_score_what_is_left_on_the_ablated_model() -> None:
    model, task = Redundant(), planted_task()
    once = circuits.discover(model, task, method="attribution_patching")
    assert not any(tensor.any() for tensor in once.scores.values())  # saturated: the gradient vanishes everywhere
    # By activation the redundant ones are dropped one after another; the rest is scored on the ablated model.
    twice = circuits.discover(model, task, method="attribution_patching", rounds=2, density=0.3)
    # Round 1 drops by position (all tie), and what is left is worth its own activation.
    assert twice.rounds is not None
    left = twice.at(1).nodes()[0].unit
    assert twice.scores["mlp_neuron:down"][left] == pytest.approx([1.0, 0.9, 0.1][left])
    sizes = [twice.at(size).size for size in range(4)]
    assert sizes == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("method", ["attnlrp", "attribution_patching", "relp", "attribution_patching_ig", "gate_ig"])
def test_a_round_is_one_shot_on_the_ablated_model(method: str, ablation: str) -> None:
    """Under zero ablation the masked model is that model; under interchange methods that run the counterfactual share it."""
    model, task = build("llama"), small_task()
    steps = {"steps": 2} if method in ("attribution_patching_ig", "gate_ig") else {}
    asked = chosen(method, statistic="abs_token", **steps)
    options = {"batch_size": 2, "ablation": ablation}
    rounds = circuits.discover(model, task, "neuron", asked, rounds=2, density=0.25, **options)
    first = circuits.discover(model, task, "neuron", asked, **options)
    assert rounds.at(48) == first.at(48)  # of 96 half are left after the first round
    assert rounds.rounds is not None and sum(int((values == 1).sum()) for values in rounds.rounds.values()) == 24
    kept, batches = first.at(48).kept, task.batches(2)
    reference = reference_for(model, first.sites, batches, ablation)
    scores = UnitScores(first.sites, "abs_token")
    for batch in batches:
        way = way_of(asked, "abs_token")
        explained = Explained(model, first.sites, batch, task, None, way, "warn", kept, reference(batch))
        scores.add(explained.contributions(), len(batch["input_ids"]))
    for name, expected in scores.compute().items():
        left = rounds.rounds[name] == 1  # dropped by the scores of the first round's model; the rest was scored again
        torch.testing.assert_close(rounds.scores[name][left], expected[left], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("by", ["mean", "sum", "max"])
def test_only_what_is_left_normalizes_later_rounds(by: str) -> None:
    """Of two groups of equal scores none is preferred because less of it is left."""
    scores = {"a": torch.ones(100), "b": torch.ones(100)}
    kept = {"a": torch.arange(100) < 50, "b": torch.arange(100) < 2}
    found = _normalized(scores, by, kept)
    expected = {"mean": (1, 1), "sum": (1 / 50, 1 / 2), "max": (1, 1)}[by]
    assert [float(found[name][0]) for name in "ab"] == pytest.approx(expected)


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
    ranking = circuits.discover(model, planted_task(), "weight", "gradient", rounds=2, density=0.1)
    assert ranking.granularity == "weight" and set(ranking.scores) == {"up.weight", "down.weight"}
    best = ranking.at(4)
    used = {("up.weight", 1), ("up.weight", 7), ("down.weight", 12), ("down.weight", 13)}  # of the two that add 4
    assert {(node.group, node.unit) for node in best.nodes()} == used
    masks = best.to_masks()
    assert masks.num_entries - masks.num_pruned == 4
    with pytest.raises(ValueError, match="scores units, not weights"):
        circuits.discover(model, planted_task(), "weight", "attribution_patching")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("granularity", "method"), [("weight", "attnlrp"), ("weight", "wanda"), ("neuron", "wanda"), ("neuron", "attnlrp")]
)
def test_first_tokens_do_not_count(granularity: str, method: str) -> None:
    model, task = build("llama"), small_task()
    totals = [
        sum(float(values.sum()) for values in found.scores.values())
        for found in (
            circuits.discover(model, task, granularity, chosen(method, skip_first=skip)) for skip in (0, 1, 100)
        )
    ]
    assert totals[0] > totals[1] > totals[2] == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", circuits.NODE_METHODS)
def test_discovery_changes_nothing(method: str) -> None:
    model = build("llama").train()
    task = small_task()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    circuits.discover(model, task, ["head", "neuron"], method, rounds=2, density=0.2)
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


@pytest.mark.slow
def test_rankings_and_circuits_are_saved(tmp_path: Path) -> None:
    ranking = circuits.discover(build("gpt2"), small_task(), ["head", "neuron"], rounds=2, density=0.2)
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
        ({"rounds": 0}, "rounds must be an integer of at least 1, got 0"),
        ({"density": 1.0}, "density must be a number in"),
        ({"order": "ascending"}, "order must be one of"),
        ({"method": LRP(target="next_token")}, "what is explained is the task's, leave out its target"),
        ({"method": Magnitude()}, "'magnitude' has no scores of a circuit's units"),
        ({"granularity": "weight", "method": "gate_ig"}, "'gate_ig' scores units, not weights"),
        ({"method": LRP(statistic="geometric")}, "statistic must be one of .* for units"),
        ({"ablation": "noise"}, "ablation must be"),
        ({"normalize": "median"}, "normalize must be"),
        ({"exclude": ["*"]}, "has no mlp_neuron"),
        ({"granularity": "head"}, "has no head"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        circuits.discover(neurons(), planted_task(), **options)


def test_methods_refuse_what_cannot_be_when_they_are_made() -> None:
    for make, message in (
        (lambda: circuits.GateIG(steps=0), "steps must be at least 1, got 0"),
        (lambda: circuits.AttributionPatching(steps=-1), "steps must be at least 0, got -1"),
        (lambda: circuits.Activation(skip_first=-1), "skip_first must be an integer of at least 0"),
        (lambda: circuits.RelP(statistic="mean"), "statistic must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_weights_are_ranked_by_a_method_of_ones_own() -> None:
    class Smallest(Method):
        """Weights close to zero are the most important."""

        def score(self, scorable: Scorable) -> torch.Tensor:
            return 1 / (1 + scorable.weight.abs())

    model = build("llama")
    ranking = circuits.discover(model, small_task(), "weight", Smallest())
    assert ranking.description["method"] == "smallest"
    for name, values in ranking.scores.items():
        assert torch.equal(values, 1 / (1 + model.get_parameter(name).detach().abs()))


def test_methods_of_circuits_are_refused_in_pruning() -> None:
    with pytest.raises(ValueError, match="'gate_ig' ranks units of circuits: use "):
        prune(build("llama"), [], method=circuits.GateIG())
