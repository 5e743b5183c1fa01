"""Which units are scored and pruned: by which method, of several kinds, by patterns."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.relevance import Relevance
from tests.support.small_models import batch_for, build, forward, largest_sum


def test_rows_of_an_embedding_are_scored_by_the_tokens_that_occur() -> None:
    model, batch = build("llama"), batch_for("llama")
    rows = lrp_prune.attribute(model, [batch], granularity="embedding", target=largest_sum)["model.embed_tokens.weight"]
    with lrp_prune.attributing(model) as propagation:
        relevance = propagation.relevance(largest_sum(model, batch))["model.embed_tokens"]
    expected = torch.zeros(50).index_add_(0, batch["input_ids"].flatten(), relevance.sum(-1).abs().flatten()) / 2
    torch.testing.assert_close(rows, expected)
    assert (rows > 0).sum() <= batch["input_ids"].unique().numel()


def test_units_are_chosen_by_patterns_of_their_layers() -> None:
    model, batch = build("llama"), batch_for("llama")
    neurons = lrp_prune.attribute(model, [batch], granularity="neuron", include=["model.layers.1.*"])
    assert list(neurons) == ["model.layers.1.mlp.down_proj"]
    with pytest.raises(ValueError, match="Sequential has no head"):
        lrp_prune.attribute(
            nn.Sequential(nn.Linear(3, 3)), [(torch.randn(2, 3), torch.tensor([0, 1]))], granularity="head"
        )


@pytest.mark.slow
def test_abs_sample_separates_samples() -> None:
    model, ids = build("llama"), torch.randint(3, 50, (4, 6))
    together = lrp_prune.attribute(model, [{"input_ids": ids}], granularity="neuron", statistic="abs_sample")
    apart = lrp_prune.attribute(
        model, [{"input_ids": row[None]} for row in ids], granularity="neuron", statistic="abs_sample"
    )
    signed = lrp_prune.attribute(model, [{"input_ids": ids}], granularity="neuron", statistic="signed")
    for group in together:
        torch.testing.assert_close(together[group], apart[group], rtol=1e-4, atol=1e-8)
        assert (together[group] >= signed[group].abs() - 1e-7).all()


KINDS = ("neuron", "head", "block", "embedding")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lrp", "gradient", "wanda", "magnitude", "random"])
@pytest.mark.parametrize("granularity", KINDS)
def test_every_method_prunes_the_same_units(granularity: str, method: str) -> None:
    model, batch = build("llama"), batch_for("llama")
    reference = lrp_prune.attribute(model, [batch], granularity=granularity)
    masks = lrp_prune.prune(model, [batch], 0.5, method=method, granularity=granularity, scope="layer")
    assert masks.granularity == granularity
    assert set(masks) == {member.parameter for members in reference.members.values() for member in members}
    for group, members in reference.members.items():
        units = len(reference[group])
        kept = sum(int(member.any_kept(masks[member.parameter], units).sum()) for member in members[:1])
        assert kept == units - round(units / 2)


def test_units_by_magnitude_have_the_mean_square_of_what_they_own() -> None:
    model, batch = build("llama"), batch_for("llama")
    scorer = lrp_prune.pruning.scorer("magnitude", model, granularity="neuron")
    scorer.update(batch)
    layer = model.model.layers[0].mlp
    owned = torch.cat([layer.down_proj.weight.T, layer.gate_proj.weight, layer.up_proj.weight], 1)
    torch.testing.assert_close(scorer.compute()["model.layers.0.mlp.down_proj"], owned.detach().square().mean(1).sqrt())


@pytest.mark.parametrize("granularity", ["neuron", "head", "block"])
def test_units_by_wanda_have_the_norm_of_what_they_contribute(granularity: str) -> None:
    model, batch = build("llama"), batch_for("llama")
    scorer = lrp_prune.pruning.scorer("wanda", model, granularity=granularity)
    scorer.update(batch)
    group = f"model.layers.0.{'self_attn.o_proj' if granularity == 'head' else 'mlp.down_proj'}"
    read: list[Tensor] = []
    handle = model.get_submodule(group).register_forward_pre_hook(lambda _, args: read.append(args[0].reshape(14, -1)))
    forward(model, batch)
    handle.remove()
    contributed = model.get_submodule(group).weight.detach().square().sum(0) * read[0].square().sum(0) / 2
    width = {"neuron": 1, "head": 8, "block": 48}[granularity]
    torch.testing.assert_close(scorer.compute()[group], contributed.view(-1, width).sum(1).sqrt())


def test_units_of_convolutions_by_wanda_in_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1, groups=2), nn.Flatten(), nn.Linear(6 * 9, 3)
    )
    x = torch.randn(2, 4, 3, 3)
    scorer = lrp_prune.pruning.scorer("wanda", model, granularity="neuron")
    scorer.update((x, torch.tensor([0, 1])))
    energy = model[:2](x).square().sum((0, 2, 3))
    weights = model[2].weight.detach().square().sum((2, 3)).view(2, 3, 4).sum(1).view(-1)
    torch.testing.assert_close(scorer.compute()["2"], (energy * weights / 2).sqrt())


def test_rows_of_an_embedding_by_wanda_count_how_often_they_are_looked_up() -> None:
    model, batch = build("llama"), batch_for("llama")
    scorer = lrp_prune.pruning.scorer("wanda", model, granularity="embedding")
    scorer.update(batch)
    counts = torch.bincount(batch["input_ids"].view(-1), minlength=50)
    table = model.model.embed_tokens.weight.detach()
    torch.testing.assert_close(
        scorer.compute()["model.embed_tokens.weight"], (counts * table.square().sum(1) / 2).sqrt()
    )


def test_units_of_several_kinds_are_pruned_kind_by_kind() -> None:
    model, batch = build("llama"), batch_for("llama")
    both = lrp_prune.attribute(model, [batch], granularity=["head", "neuron"])
    assert both.granularity == "head,neuron"
    apart = {kind: lrp_prune.attribute(model, [batch], granularity=kind) for kind in ("head", "neuron")}
    for kind, alone in apart.items():
        for group, values in alone.items():
            torch.testing.assert_close(both[f"{kind}:{group}"], values)
    masks = lrp_prune.select(both, {"head:*": 0.25, "neuron:*": 0.5}, scope="global")
    for kind, sparsity in (("head", 0.25), ("neuron", 0.5)):
        alone = lrp_prune.select(apart[kind], sparsity, scope="global")
        assert all(torch.equal(masks[name], alone[name]) for name in alone)
    halves = lrp_prune.select(both, 0.5, scope="global")
    heads = lrp_prune.select(apart["head"], 0.5, scope="global")
    assert all(torch.equal(halves[name], heads[name]) for name in heads)
    more = lrp_prune.select(both, 0.75, scope="global", existing=halves)
    assert all(not (more[name] & ~halves[name]).any() for name in halves)


def test_units_of_several_kinds_are_saved(tmp_path: Path) -> None:
    model, batch = build("llama"), batch_for("llama")
    both = lrp_prune.attribute(model, [batch], granularity=["block", "neuron"])
    both.save(tmp_path / "units.safetensors")
    again = Relevance.load(tmp_path / "units.safetensors")
    assert again.members == both.members and again.kinds() == both.kinds()
    (both + again).normalized("mean")


@pytest.mark.parametrize("given", [["weight", "head"], ["head", "head"], [], ["heads"]])
def test_impossible_lists_of_granularities_are_refused(given: list[str]) -> None:
    with pytest.raises(ValueError, match="granularit"):
        lrp_prune.attribute(build("llama"), [batch_for("llama")], granularity=given)


def test_units_of_excluded_or_frozen_layers_are_left_alone() -> None:
    def three() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))

    batch = (torch.randn(8, 4), torch.randint(2, (8,)))
    model = three()
    assert list(lrp_prune.attribute(model, [batch], granularity="neuron", exclude=["0"])) == ["4"]
    assert list(lrp_prune.attribute(model, [batch], granularity="neuron", include=["0"])) == ["2"]
    model[2].requires_grad_(False)
    frozen = lrp_prune.attribute(model, [batch], granularity="neuron", trainable_only=True)
    assert list(frozen) == ["2"]
