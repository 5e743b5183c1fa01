"""One shot without training, with every method and on every granularity."""

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import lrp_prune
from lrp_prune.pruning import LRP, METHODS, Random, scorer
from tests.support.small_models import batch_for, build, forward


def _pruned(model: nn.Module, masks: lrp_prune.Masks) -> int:
    parameters = dict(model.named_parameters())
    for name, kept in masks.items():
        assert not parameters[name][~kept].any()
    return sum(int((~kept).sum()) for kept in masks.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_hugging_face_model_is_pruned_in_one_line(name: str, method: str) -> None:
    model, batch = build(name), batch_for(name)
    dense = copy.deepcopy(model)
    masks = lrp_prune.prune(model, [batch], sparsity=0.5, method=method, scope="global", recalibrate=False)
    assert masks.num_pruned == _pruned(model, masks) == round(0.5 * masks.num_entries)
    for (parameter_name, one), (_, two) in zip(dense.named_parameters(), model.named_parameters(), strict=True):
        kept = masks[parameter_name] if parameter_name in masks else torch.ones_like(one, dtype=torch.bool)
        assert torch.equal(one[kept], two[kept])
    assert torch.isfinite(forward(model, batch)).all()


@pytest.mark.parametrize("granularity", ["neuron", "head", "block"])
def test_units_are_pruned_whole(granularity: str) -> None:
    model, batch = build("llama"), batch_for("llama")
    masks = lrp_prune.prune(model, [batch], sparsity=0.25, granularity=granularity)
    units = {"neuron": 96, "head": 8, "block": 4}[granularity]
    columns = sum(
        int((~kept).all(0).sum())
        for name, kept in masks.items()
        if name.endswith(("o_proj.weight", "down_proj.weight"))
    )
    width = {"neuron": 1, "head": 8}.get(granularity)
    if width is not None:
        assert columns == units // 4 * width
    else:
        assert sum(bool((~kept).all()) for kept in masks.values()) == 1


@pytest.mark.parametrize(("scope", "sparsity"), [("row", 0.5), ("column", 0.25), ("layer", 0.3), ("2:4", 0.5)])
def test_scopes_hold_for_lrp(scope: str, sparsity: float) -> None:
    model = build("llama")
    masks = lrp_prune.prune(model, [batch_for("llama")], sparsity=sparsity, scope=scope)
    for kept in masks.values():
        if scope == "row":
            assert (kept.sum(1) == kept.shape[1] // 2).all()
        elif scope == "column":
            assert ((~kept).sum(0) == round(sparsity * kept.shape[0])).all()
        elif scope == "2:4":
            assert (kept.reshape(-1, 4).sum(1) == 2).all()
        else:
            assert int((~kept).sum()) == round(sparsity * kept.numel())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "snip"}, "method must be one of"),
        ({"sparsity": 1.5}, "sparsity must be"),
        ({"scope": "2:4", "sparsity": 0.7}, "2:4"),
        ({"include": ["*.fc9"]}, "matches no parameter"),
        ({"method": None}, "method must be one of"),
        ({"granularity": "channel"}, "granularity must be one of"),
        ({"granularity": ["weight", "head"]}, "several granularities are different kinds of units"),
        ({"method": LRP(target="class")}, "LlamaForCausalLM is a language model: pass target='next_token'"),
    ],
)
def test_nothing_changes_where_an_argument_is_wrong(options: dict[str, Any], message: str) -> None:
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        lrp_prune.prune(model, [batch_for("llama")], **{"sparsity": 0.5, **options})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_batch_that_is_not_finite_changes_nothing() -> None:
    model = build("vit")
    before = copy.deepcopy(model.state_dict())
    batch = {**batch_for("vit"), "labels": torch.tensor([0, 1])}
    broken = {**batch, "pixel_values": batch["pixel_values"] * float("nan")}
    with pytest.raises(FloatingPointError, match="not finite on this batch"):
        lrp_prune.prune(model, [batch, broken], sparsity=0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_random_scores_depend_on_the_seed_only() -> None:
    first, again, other = (scorer(Random(seed), build("llama")).compute() for seed in (0, 0, 1))
    for name in first:
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


def test_lrp_finds_the_weights_that_matter() -> None:
    """Inputs that the label does not depend on get their weights pruned first; magnitude cannot know."""
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    y = (x[:, 0] + x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 2))
    with torch.no_grad():
        model[0].weight.fill_(0.5)[:, :2] = torch.randn(16, 2) * 0.3
    x[:, 2:] *= 0.01
    relevance = lrp_prune.attribute(model, [(x, y)], target="class")["0.weight"]
    assert relevance[:, :2].mean() > 5 * relevance[:, 2:].mean()


@pytest.mark.slow
def test_rounds_score_the_pruned_model_and_never_compound() -> None:
    batches = [batch_for("llama", 4, 9)]
    one, three = build("llama"), build("llama")
    at_once = lrp_prune.prune(one, batches, sparsity=0.6)
    in_rounds = lrp_prune.prune(three, iter(batches), sparsity=0.6, rounds=3)
    assert at_once.num_pruned == in_rounds.num_pruned == _pruned(three, in_rounds)
    assert any(not torch.equal(at_once[name], in_rounds[name]) for name in at_once)
    first = lrp_prune.prune(build("llama"), batches, sparsity=0.2)
    assert all(not in_rounds[name][~first[name]].any() for name in first)


def test_a_failing_round_undoes_the_rounds_before() -> None:
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    calls: list[int] = []

    def target(inner: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(1)
        value = forward(inner, batch).sum()
        return value * float("nan") if len(calls) == 3 else value

    with pytest.raises(FloatingPointError):
        lrp_prune.prune(
            model, [batch_for("llama")], sparsity=0.5, method=LRP(target=target), rounds=4, recalibrate=False
        )
    assert len(calls) == 3
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", ["lrp", "wanda"])
def test_a_module_is_run_by_its_own_target(method: str) -> None:
    """One that has no forward, and one whose forward is not what is explained."""

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def relevance_target(self, batch: Any) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.encoder(batch[0]).relu())
            return logits.gather(1, batch[1][:, None]).sum()

    class WithForward(Classifier):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise AssertionError("not what is explained")

    batch = (torch.randn(16, 8), torch.randint(3, (16,)))
    for kind in (Classifier, WithForward):
        masks = lrp_prune.prune(kind(), [batch], sparsity=0.5, method=method)
        assert masks.sparsity == 0.5
        assert set(masks) == {"encoder.weight", "head.weight"}
    encoding = METHODS[method](target=lambda model, batch: model.encoder(batch[0]).sum())
    only_encoder = lrp_prune.prune(kind(), [batch], method=encoding, exclude=["head"])
    assert set(only_encoder) == {"encoder.weight"}


@pytest.mark.parametrize("granularity", ["weight", "neuron", "head", "block", ["head", "neuron"]])
def test_step_by_step_is_by_default_what_pruning_is(granularity: str | list[str]) -> None:
    model, batch = build("llama"), batch_for("llama")
    by_steps = lrp_prune.select(lrp_prune.attribute(model, [batch], granularity=granularity), 0.5)
    assert by_steps == lrp_prune.prune(copy.deepcopy(model), [batch], 0.5, granularity=granularity)
