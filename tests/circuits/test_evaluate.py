"""Evaluation against hand-computed values on planted circuits: faithfulness, completeness, minimality, CPR, CMD, ablations."""

import json
import math
from pathlib import Path

import pytest
import torch

from lrp_prune import circuits
from lrp_prune.circuits import Circuit, Node, Ranking
from lrp_prune.tasks import IndirectObject, TableTask
from tests.support.circuit_tasks import chosen, ioi_model, small_task
from tests.support.planted import NO, WORDS, YES, PlantedHeads, PlantedNeurons, planted_task, word_tokenizer
from tests.support.small_models import build, forward

pytestmark = pytest.mark.filterwarnings("ignore:the circuit is evaluated on the prompts")
X, Y, C = [4.0, 2.0, 1.0, 0.5], [0.0, 1.0, 0.0, 0.5], [1.0, 2.0, -1.0, 5.0]
"""Contributions in the clean prompt: 4, 4, -1, 2.5 (9.5 in all); in the counterfactual one: 0, 2, 0, 2.5 (4.5 in all)."""


def ranking(order: list[float] = [4.0, 3.0, 2.0, 1.0]) -> Ranking:  # noqa: B006  # read only
    found = circuits.discover(PlantedNeurons(X, Y, C), planted_task(), method="attribution_patching")
    return Ranking({"mlp_neuron:down": torch.tensor(order)}, found.sites, found.granularity)


def evaluate(ablation: str, sizes: list[int] | None = None, **options: object) -> circuits.EvaluationResult:
    model = PlantedNeurons(X, Y, C)
    return circuits.evaluate(model, ranking(), planted_task(), sizes or [0, 1, 2, 3, 4], ablation, **options)


@pytest.mark.parametrize("ablation", ["counterfactual", "mean"])
def test_faithfulness_and_completeness_under_interchange(ablation: str) -> None:
    # The prompts have one token, so that the mean over counterfactuals is the counterfactual.
    result = evaluate(ablation)
    logits = torch.tensor([4.5, 8.5, 10.5, 9.5, 9.5], dtype=torch.float64)
    torch.testing.assert_close(result.mean("logit_difference"), logits)
    torch.testing.assert_close(result.faithfulness, (logits - 4.5) / 5)
    # Without the circuit: 9.5, 5.5, 3.5, 4.5, 4.5.
    without = torch.tensor([9.5, 5.5, 3.5, 4.5, 4.5], dtype=torch.float64)
    torch.testing.assert_close(result.completeness, 1 - (without - 4.5) / 5)
    assert result.fractions == (0, 0.25, 0.5, 0.75, 1)


def test_faithfulness_under_zero_ablation() -> None:
    result = evaluate("zero")
    torch.testing.assert_close(result.faithfulness, torch.tensor([0, 4, 8, 7, 9.5], dtype=torch.float64) / 9.5)


def test_areas_as_the_benchmark_defines_them() -> None:
    result = evaluate("counterfactual", [1, 2, 4])
    # f: 0.8 at 1/4, 1.2 at 1/2, 1 at 1.
    assert result.cpr == pytest.approx(0.25 * (0.8 + 1.2) / 2 + 0.5 * (1.2 + 1) / 2)
    assert result.cmd == pytest.approx(0.25 * (0.2 + 0.2) / 2 + 0.5 * (0.2 + 0) / 2)
    logarithmic = math.log(2) * (0.2 + 0.2) / 2 + math.log(2) * 0.2 / 2
    assert float(result.area(distance=True, logarithmic=True)) == pytest.approx(logarithmic)
    assert evaluate("counterfactual", [4, 1, 2]).cpr == pytest.approx(result.cpr)
    with pytest.raises(ValueError, match="at least two sizes"):
        evaluate("counterfactual", [2]).cpr  # noqa: B018
    with pytest.raises(ValueError, match="logarithmic"):
        evaluate("counterfactual", [0, 1]).area(logarithmic=True)


def test_signed_and_absolute_rankings_differ_and_say_so() -> None:
    model, task = PlantedNeurons(X, Y, [1.0, 2.0, -4.0, 5.0]), planted_task()
    found = [
        circuits.discover(model, task, method=chosen("attribution_patching", statistic="signed"), order=order)
        for order in ("absolute", "signed")
    ]
    results = [circuits.evaluate(model, one, task, [1, 2, 4], "zero") for one in found]
    assert [result.order for result in results] == ["absolute", "signed"]
    assert results[0].cpr != results[1].cpr


def test_every_metric_is_measured_at_once() -> None:
    result = evaluate("zero", [0, 4])
    assert result.full["accuracy"].item() == 1 and result.empty["accuracy"].item() == 0
    full, empty = torch.zeros(6), torch.zeros(6)
    full[1], empty[1], full[YES] = 1.0, 1.0, 9.5  # the residual stream holds the word "x" itself
    p, q = full.softmax(0), empty.softmax(0)
    assert float(result.empty["kl"]) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert float(result.full["probability_difference"]) == pytest.approx(float(p[YES] - p[NO]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ["counterfactual", "mean", "zero"])
def test_rankings_compared_at_once_score_as_one_by_one(ablation: str) -> None:
    model, task = build("llama"), small_task()
    rankings = {method: circuits.discover(model, task, "neuron", method) for method in ("attnlrp", "random")}
    sizes, options = [0, 5, 40, 96], {"seeds": [0, 1], "complements": True}
    together = circuits.compare(model, {**rankings, "five": rankings["random"].at(5)}, task, sizes, ablation, **options)
    for name, ranking in rankings.items():
        alone = circuits.evaluate(model, ranking, task, sizes, ablation, **options)
        assert together[name].to_dict() == alone.to_dict()
    assert together["five"].sizes == (5,) and together["five"].order == "given"
    torch.testing.assert_close(together["five"].faithfulness[0], together["random"].faithfulness[1])
    torch.testing.assert_close(together["random"].interval("kl")[0], torch.zeros((), dtype=torch.float64) + _half(
        together["random"].empty["kl"]))  # fmt: skip


def _half(values: torch.Tensor) -> float:
    return 12.706 * float(values.std(unbiased=True)) / math.sqrt(2)


def test_circuits_of_other_nodes_are_not_compared() -> None:
    model, task = build("llama"), small_task()
    with pytest.raises(ValueError, match="of different nodes"):
        circuits.compare(model, {kind: circuits.discover(model, task, kind) for kind in ("head", "neuron")}, task)
    with pytest.raises(ValueError, match="no circuit"):
        circuits.compare(model, {}, task)


def test_minimality_is_what_each_node_is_needed_for() -> None:
    model, circuit = PlantedNeurons(X, Y, C), ranking().at(3)
    found = circuits.minimality(model, circuit, planted_task())
    assert found == {
        Node("mlp_neuron:down", 0): pytest.approx(4 / 5),
        Node("mlp_neuron:down", 1): pytest.approx(2 / 5),
        Node("mlp_neuron:down", 2): pytest.approx(1 / 5),
    }
    assert float(evaluate("counterfactual", [3], minimality_nodes=3).minimality) == pytest.approx(1 / 5)


@pytest.mark.parametrize("ablation", ["counterfactual", "zero"])
def test_heads_channels_and_blocks_are_ablated_as_planted(ablation: str) -> None:
    x, y, c = [4.0, 2.0, 1.0], [0.0, 1.0, 0.0], [1.0, 2.0, -1.0]
    model, task = PlantedHeads(x, y, c), planted_task(length=3)
    sites = circuits.discover(model, task, circuits.NODE_KINDS).sites
    other = {"zero": [0.0, 0.0, 0.0], "counterfactual": [0.0, 2.0, 0.0]}[ablation]
    open_ = {site.name: torch.ones(site.units, dtype=torch.bool) for site in sites}

    def value(**closed: list[int]) -> float:
        kept = {name: mask.clone() for name, mask in open_.items()}
        for kind, units in closed.items():
            kept[next(name for name in kept if name.startswith(f"{kind}:"))][units] = False
        circuit = Circuit(kept, sites, "all")
        return float(circuits.evaluate(model, circuit, task, ablation=ablation).mean("logit_difference"))

    full = 4 + 4 - 1 + 0.25 + 1
    assert value() == pytest.approx(full)
    assert value(head=[1]) == pytest.approx(full - 4 + other[1])
    assert value(attention_neuron=[2]) == pytest.approx(full - 4 + other[1])
    assert value(attention_neuron=[3]) == pytest.approx(full)
    assert value(mlp_neuron=[0]) == value(mlp_block=[0]) == pytest.approx(full - 1)
    # What a block adds includes its bias, which the counterfactual run adds as well.
    bias = 0.25 if ablation == "counterfactual" else 0.0
    assert value(attention_block=[0]) == pytest.approx(sum(other) + bias + 1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "gemma"])
@pytest.mark.parametrize("granularity", ["head", "neuron", "block", "attention_neuron"])
def test_masks_are_the_model_of_zero_ablation(name: str, granularity: str) -> None:
    model, task = build(name), small_task()
    circuit = circuits.discover(model, task, granularity, "random").at(0.5)
    expected = circuits.evaluate(model, circuit, task, ablation="zero").mean("logit_difference")
    circuit.to_masks().apply_(model)
    everything = Circuit({g: torch.ones_like(m) for g, m in circuit.kept.items()}, circuit.sites, circuit.granularity)
    pruned = circuits.evaluate(model, [everything, circuit], task, ablation="counterfactual")
    torch.testing.assert_close(pruned.mean("logit_difference")[:1], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_everything_kept_is_the_model_and_everything_interchanged_but_embeddings_is_the_rest(name: str) -> None:
    model, task = build(name), small_task()
    ranking = circuits.discover(model, task, "block", "random")
    result = circuits.evaluate(model, ranking, task, [0, len(ranking)])
    torch.testing.assert_close(result.faithfulness, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.equal(result.circuits["logit_difference"][:, 1], result.full["logit_difference"])
    assert float(result.mean("kl")[1]) == pytest.approx(0, abs=1e-9)


def test_weights_are_zeroed_and_come_back() -> None:
    model, task = build("llama"), small_task()
    ranking = circuits.discover(model, task, "weight", "gradient")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = circuits.evaluate(model, ranking, task, [0.3, 0.9], "zero")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="ablation must be 'zero'"):
        circuits.evaluate(model, ranking, task, [0.3], "counterfactual")
    ranking.to_masks(0.3).apply_(model)
    direct = [
        (lambda logits: float(logits[answer] - logits[wrong].mean()))(
            forward(model, {"input_ids": torch.tensor([list(sample.clean)])})[0]
        )
        for sample in task.samples
        for answer, wrong in [(sample.answers[0], list(sample.distractors))]
    ]
    assert float(result.mean("logit_difference")[0]) == pytest.approx(sum(direct) / len(direct), rel=1e-4)


def rows(words: list[tuple[str, str]]) -> TableTask:
    table = [{"clean": a, "counterfactual": b, "answers": " yes", "distractors": " no"} for a, b in words]
    return TableTask(word_tokenizer(WORDS), table)


def test_intervals_are_students_over_seeds() -> None:
    task = rows([("x", "y"), ("pad x", "pad y"), ("x x", "pad y")] * 2 + [("y", "x")])
    result = circuits.evaluate(PlantedNeurons(X, Y, C), ranking(), task, [1, 2, 4], "zero", seeds=[0, 1, 2])
    by_seed = [
        circuits.evaluate(PlantedNeurons(X, Y, C), ranking(), task.resampled(seed), [1, 2, 4], "zero").faithfulness
        for seed in range(3)
    ]
    values = torch.stack(by_seed)
    torch.testing.assert_close(result.faithfulness, values.mean(0))
    torch.testing.assert_close(result.faithfulness_interval, 4.303 * values.std(0) / math.sqrt(3))
    assert result.cpr_interval > 0 and math.isnan(evaluate("zero").cpr_interval)
    assert json.loads(json.dumps(result.to_dict()))["seeds"] == 3
    assert evaluate("zero", [1]).to_dict()["faithfulness_interval"] == [None]


def test_the_discoverys_prompts_are_noticed() -> None:
    model, task = PlantedNeurons(X, Y, C), planted_task()
    found = circuits.discover(model, task)
    with pytest.warns(UserWarning, match="hold one part out"):
        circuits.evaluate(model, found, task, [1])


def test_what_cannot_be_normalised_is_refused() -> None:
    with pytest.raises(ValueError, match="faithfulness is not defined"):
        evaluate("counterfactual", metric="accuracy")


def test_overlap_and_complement() -> None:
    first, second = ranking().at(3), ranking([1.0, 3.0, 4.0, 5.0]).at(2)
    found = first.overlap(second)
    assert (found.shared, found.first, found.second) == (1, 3, 2)
    assert found.jaccard == pytest.approx(1 / 4) and found.expected == pytest.approx(3 * 2 / 4)
    assert (~first).size == 1 and first.overlap(~first).shared == 0
    with pytest.raises(ValueError, match="different nodes"):
        first.overlap(Circuit({"w": torch.ones(2, dtype=torch.bool)}, [], "weight"))


@pytest.mark.slow
def test_mib_graphs_have_all_nodes_and_edges_of_the_format(tmp_path: Path) -> None:
    model, task = build("llama"), small_task()
    ranking = circuits.discover(model, task, ["head", "mlp_block"], "attribution_patching")
    circuit = ranking.at(6)
    circuits.save_mib_graph(circuit, tmp_path / "graph.json", ranking)
    graph = json.loads((tmp_path / "graph.json").read_text())
    assert graph["cfg"] == {"n_layers": 2, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 32}
    nodes = graph["nodes"]
    assert set(nodes) == {
        "input",
        "logits",
        "m0",
        "m1",
        *(f"a{layer}.h{head}" for layer in (0, 1) for head in range(4)),
    }
    assert sum(node["in_graph"] for node in nodes.values()) == 6 + 2
    assert nodes["a1.h2"]["score"] == pytest.approx(float(ranking.scores["head:model.layers.1.self_attn.o_proj"][2]))
    # To the heads of layer 0: 1 source, layer 1: 6; times 3 inputs; MLPs: 5 and 10; logits: 11.
    assert len(graph["edges"]) == 3 * 4 * (1 + 6) + 5 + 10 + 11
    for edge, entry in graph["edges"].items():
        parent, child = edge.split("<")[0].split("->") if "<" in edge else edge.split("->")
        assert entry["in_graph"] == (nodes[parent]["in_graph"] and nodes[child]["in_graph"])
    neurons = circuits.discover(model, task, "neuron").at(3)
    with pytest.raises(ValueError, match="not mlp_neurons"):
        circuits.save_mib_graph(neurons, tmp_path / "neurons.json")


@pytest.mark.slow
def test_weights_are_zeroed_under_autocast_too() -> None:
    """Autocast keeps copies of weights in its precision, by default as long as it lasts."""
    model, tokenizer = ioi_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    train, held_out = IndirectObject(tokenizer, samples=8).split()
    weights = circuits.discover(model, train, "weight")
    found = []
    for cached in (False, True):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            result = circuits.evaluate(model, weights, held_out, [0.0, 0.1, 0.5], "zero", complements=False)
        found.append(result.faithfulness)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found)


def test_a_result_prints_as_a_table() -> None:
    result = evaluate("zero", [1, 4])
    lines = repr(result).splitlines()
    assert "tensor" not in repr(result) and len(lines) == 5
    assert lines[0] == (
        "EvaluationResult: zero ablation, logit_difference 9.500 of the full model and 0.000 of the empty circuit, 1 seed"
    )
    assert lines[1].split()[:4] == ["nodes", "share", "faithfulness", "completeness"]
    assert lines[2].split()[:4] == ["1", "25.00%", "0.421", f"{float(result.completeness[0]):.3f}"]
    assert lines[3].split()[:3] == ["4", "100.00%", "1.000"]
    assert lines[4] == f"CPR {result.cpr:.3f}, CMD {result.cmd:.3f}"
