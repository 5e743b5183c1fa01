"""Circuits of models that are written, run or wrapped in other ways than most."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from lrp_prune import circuits
from lrp_prune.circuits.ablation import ABLATIONS
from lrp_prune.circuits.references import reference_for
from lrp_prune.circuits.sites import find_sites
from tests.support.circuit_tasks import chosen, small_task
from tests.support.small_models import build

pytestmark = pytest.mark.filterwarnings("ignore:the circuit is evaluated on the prompts")


def falcon(in_place: bool) -> FalconForCausalLM:
    """Falcon adds attention's output to the MLP's output in place; here also one whose MLP returns another tensor."""
    torch.manual_seed(0)
    config = FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, alibi=False)
    model = FalconForCausalLM(config).eval().double().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(5)
    for layer in () if in_place else model.transformer.h:
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x, forward=forward: forward(x) * 1.0
    return model


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("method", ["gradient", "attribution_patching", "gate_ig", "activation"])
def test_outputs_that_are_added_to_in_place_are_what_they_were(method: str, ablation: str) -> None:
    task, found = small_task(), []
    for in_place in (True, False):
        model = falcon(in_place)
        options = {"ablation": ablation, "unruled": "ignore"}
        ranking = circuits.discover(model, task, "block", chosen(method, statistic="signed"), **options)
        result = circuits.evaluate(model, ranking, task, [0, 1, 2, 4], ablation, complements=False)
        found.append((torch.cat(list(ranking.scores.values())), result.faithfulness, result.empty["logit_difference"]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert found[0][1][[0, 3]].tolist() == pytest.approx([0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["activation", "wanda", "attnlrp", "gate_ig"])
def test_compiled_models_are_ablated(method: str) -> None:
    task, plain, compiled = small_task(), build("llama"), build("llama")
    compiled.compile(backend="eager")
    for batch in task.batches(16):  # compiled for these shapes before any hook is registered
        with torch.no_grad():
            compiled(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    rankings = [circuits.discover(model, task, "neuron", method) for model in (plain, compiled)]
    for name, scores in rankings[0].scores.items():
        torch.testing.assert_close(rankings[1].scores[name], scores)
    results = [
        circuits.evaluate(model, ranking, task, [0, 9, 1.0])
        for model, ranking in zip((plain, compiled), rankings, strict=True)
    ]
    torch.testing.assert_close(results[1].faithfulness, results[0].faithfulness)
    minimal = [circuits.minimality(model, rankings[0].at(3), task) for model in (plain, compiled)]
    assert list(minimal[1].values()) == pytest.approx(list(minimal[0].values()), rel=1e-4, abs=1e-6)
    assert all(module._compiled_call_impl is not None for module in [compiled])


class Twice(nn.Module):
    """Calls one MLP on all tokens, and then on the last one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Embedding(50, 8), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 50)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))

    def forward(self, input_ids: Tensor, attention_mask: object = None) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.mix(x.cumsum(1))
        x = (x + self.mlp(x))[:, -1:]
        return self.head(x + self.mlp(x))


def test_each_call_of_a_module_has_its_own_mean() -> None:
    model, task = Twice(), small_task()
    sites = find_sites(model, task.batches(1)[0], "neuron", task.target())
    calls: list[Tensor] = []
    handle = model.down.register_forward_pre_hook(lambda _, args: calls.append(args[0].reshape(-1, 12).double()))
    with torch.no_grad():
        for batch in task.batches(16):
            model(batch["counterfactual_ids"])
    handle.remove()
    expected = [torch.cat(calls[first::2]).mean(0) for first in (0, 1)]
    reference = reference_for(model, sites, task.batches(16), "mean")(task.batches(1)[0])
    assert reference is not None
    for mean, wanted in zip(reference["down", False], expected, strict=True):
        torch.testing.assert_close(mean, wanted)


class Routed(nn.Module):
    """Each token goes through one of two experts, which are modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: object = None) -> Tensor:
        x = self.embed(input_ids)
        expert, flat = (input_ids % 5 < 2).long().reshape(-1), x.reshape(-1, 8)
        added = torch.zeros_like(flat)
        for index, one in enumerate(self.experts):
            added = added.index_add(0, (expert == index).nonzero()[:, 0], one(flat[expert == index]))
        return self.head((x + added.view_as(x)).cumsum(1))


@pytest.mark.parametrize("method", ["gradient", "gate_ig", "activation"])
def test_experts_that_see_other_tokens_each_time_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match=r"experts\.\d\.2 does not run on the same positions .* exclude="):
        circuits.discover(Routed(), small_task(), "neuron", method, unruled="ignore")


class ByKeyword(Twice):
    def mlp(self, x: Tensor) -> Tensor:
        return self.down(input=torch.relu(self.up(x)))


def test_layers_that_are_called_by_keyword_are_refused() -> None:
    with pytest.raises(ValueError, match="down is called with its input by keyword"):
        circuits.discover(ByKeyword(), small_task(), "neuron", "gradient", unruled="ignore")


class Explains(LightningModule):
    """A module that says what relevance is of, and has no forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build("llama")

    def relevance_target(self, batch: Any) -> Tensor:
        raise AssertionError("a task has a target of its own")


@pytest.mark.slow
def test_the_model_of_a_lightning_module_runs() -> None:
    task, module = small_task(), Explains()
    ranking = circuits.discover(module, task, "head")
    plain = circuits.discover(module.model, task, "head")
    assert ranking.at(3) == plain.at(3)
    of_module, of_model = (circuits.evaluate(one, ranking, task, [0, 2, 4]) for one in (module, module.model))
    torch.testing.assert_close(of_module.faithfulness, of_model.faithfulness)
    assert circuits.GateTraining(module, task, "head").base is module.model


def test_models_that_continue_no_prompt_are_refused() -> None:
    small = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has an encoder"):
        circuits.discover(T5ForConditionalGeneration(T5Config(**small)), small_task(), "head")
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=50, pad_token_id=0
    )
    with pytest.raises(ValueError, match="is a sequence classifier, which predicts no next token"):
        circuits.discover(LlamaForSequenceClassification(config), small_task(), "head")

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            logits: Tensor = self.head(self.embedding(input_ids))
            return logits

    with pytest.raises(ValueError, match="has 2 outputs, and answers are tokens up to"):
        circuits.discover(Narrow(), small_task(), "neuron")


@pytest.mark.slow
def test_circuits_of_other_models_are_refused() -> None:
    task, model, other = small_task(), build("llama"), build("gpt2")
    for granularity in ("neuron", "weight"):
        ranking = circuits.discover(model, task, granularity, "random")
        for refused in (
            lambda ranking=ranking: circuits.evaluate(other, ranking, task, [0.5, 1.0], "zero"),
            lambda ranking=ranking: circuits.minimality(other, ranking.at(1), task, "zero"),
        ):
            with pytest.raises(ValueError, match=r"of another model: its .* has shape .* none of that name"):
                refused()
    larger = LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 3})
    deeper = type(model)(larger).eval()
    with pytest.warns(UserWarning, match="what it does not name is never ablated"):
        circuits.evaluate(deeper, circuits.discover(model, task, "neuron", "random"), task, [0.5, 1.0])


def test_minimality_needs_something_to_lose() -> None:
    task = small_task()
    same = type(task)._of(
        [type(sample)(sample.prompt, sample.clean, sample.clean, sample.answers, sample.distractors) for sample in task.samples],
        task.metric,
    )  # fmt: skip
    ranking = circuits.discover(build("llama"), task, "neuron", "random")
    with pytest.raises(ValueError, match="faithfulness is not defined"):
        circuits.minimality(build("llama"), ranking.at(2), same)


def test_half_precision_scores_nothing_where_the_prompts_agree() -> None:
    model = build("llama").to(torch.bfloat16)
    row = small_task().samples[0]
    same = type(small_task())._of(
        [type(row)(row.prompt, row.clean, row.clean, row.answers, row.distractors)], "logit_difference"
    )
    ranking = circuits.discover(model, same, "neuron", chosen("gate_ig", steps=5))
    assert not any(scores.any() for scores in ranking.scores.values())
