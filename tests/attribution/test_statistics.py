"""Relevance of weights against independent computations by hooks and autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.attribution import RelevanceAccumulator
from lrp_prune.relevance.statistics import OF_RELEVANCE
from tests.support.small_models import batch_for, build
from tests.support.written_statistics import expected_statistic, tokens_of


@pytest.mark.parametrize("statistic", [statistic for statistic in OF_RELEVANCE if statistic != "geometric"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_statistics_equal_their_definition(name: str, statistic: str) -> None:
    model, batch = build(name).double(), batch_for(name)
    expected = tokens_of(model, batch)
    relevance = lrp_prune.attribute(model, [batch], composite="gradient", statistic=statistic)
    assert set(relevance) == set(expected)
    for weight_name, (weight, a, d) in expected.items():
        value = expected_statistic("abs_token" if statistic == "pxp" else statistic, weight, a, d) / 2
        value = value.sqrt() if statistic == "squared_token" else value
        value = value.T if name == "gpt2" else value
        torch.testing.assert_close(relevance[weight_name].double(), value, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("statistic", [statistic for statistic in OF_RELEVANCE if statistic != "geometric"])
def test_convolutions_count_each_position_as_a_token(statistic: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.Flatten()).double()
    x, c = torch.randn(2, 2, 4, 4, dtype=torch.float64), torch.randn(48, dtype=torch.float64)
    relevance = lrp_prune.attribute(
        model, [x], composite="gradient", statistic=statistic, target=lambda m, b: (m(b) * c).sum()
    )
    patches = torch.nn.functional.unfold(x, 3, padding=1).transpose(1, 2)  # [samples, positions, 18]
    weight = model[0].weight.detach()
    d = c.reshape(3, 16).T.expand(2, 16, 3)
    value = (
        expected_statistic("abs_sample" if statistic == "pxp" else statistic, weight.flatten(1), patches, d).reshape(
            weight.shape
        )
        / 2
    )
    torch.testing.assert_close(
        relevance["0.weight"].double(), value.sqrt() if "squared" in statistic or "geometric" in statistic else value
    )


def test_weight_relevance_is_weight_times_the_gradient_of_the_same_graph() -> None:
    """Signed AttnLRP relevance summed over a layer's weights is what arrives at its input, for a layer without bias."""
    model, batch = build("llama", biases=False).double(), batch_for("llama")
    relevance = lrp_prune.attribute(
        model, [batch], target="last_token", composite="attnlrp", statistic="signed", matmul_dtype=None
    )
    with lrp_prune.attributing(model, latent=["model.layers.0.mlp.down_proj"]) as propagation:
        value = model(**batch, use_cache=False).logits[:, -1].amax(-1).sum()
        latent = propagation.relevance(value)["model.layers.0.mlp.down_proj"]
    torch.testing.assert_close(relevance["model.layers.0.mlp.down_proj.weight"].sum().double() * 2, latent.sum())


def test_batches_add_up() -> None:
    model, ids = build("llama"), torch.randint(3, 50, (6, 7))
    options: dict[str, Any] = {"statistic": "squared_token", "matmul_dtype": None}
    together = lrp_prune.attribute(model, [{"input_ids": ids}], **options)
    apart = lrp_prune.attribute(model, [{"input_ids": part} for part in ids.split(2)], **options)
    merged = lrp_prune.attribute(model, [{"input_ids": ids[:2]}], **options) + lrp_prune.attribute(
        model, [{"input_ids": ids[2:]}], **options
    )
    assert together.num_samples == apart.num_samples == merged.num_samples == 6
    for name in together:
        torch.testing.assert_close(apart[name], together[name])
        torch.testing.assert_close(merged[name], together[name])


def test_weights_that_no_relevance_reaches_hold_no_room_for_it() -> None:
    model, batch = build("llama"), batch_for("llama")
    accumulator = RelevanceAccumulator(model, composite="cp_lrp")
    for _ in range(2):
        accumulator.update(batch)
        held = {name for name, found in accumulator.table._statistics.items() if found.sums is not None}
        assert not any(found._room is not None for found in accumulator.table._statistics.values())
        assert {name.split(".")[-2] for name in held} == {"v_proj", "o_proj", "up_proj", "down_proj"}
    assert set(accumulator.compute().unscored) == set(accumulator.parameters) - held


def test_collecting_twice_gives_the_same_bits() -> None:
    model, batch = build("gpt2"), batch_for("gpt2")
    first, second = (lrp_prune.attribute(model, [batch]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_clear_errors_before_anything_is_scored() -> None:
    model, batch = build("llama"), batch_for("llama")
    with pytest.raises(ValueError, match=r"pattern '\*\.fc1' matches no parameter"):
        lrp_prune.attribute(model, [batch], include=["*.fc1"])
    with pytest.raises(ValueError, match="statistic must be one of"):
        lrp_prune.attribute(model, [batch], statistic="squared")
    with pytest.raises(ValueError, match="granularity must be one of"):
        lrp_prune.attribute(model, [batch], granularity="neurons")
    with pytest.raises(ValueError, match="no batch was seen"):
        lrp_prune.attribute(model, [])
    with pytest.raises(ValueError, match="no weight to score"):
        lrp_prune.attribute(model.requires_grad_(False), [batch], trainable_only=True)
    poisoned = build("llama")
    poisoned.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        lrp_prune.attribute(poisoned, [batch])
    quantized = build("llama")
    layer = quantized.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.ones(layer.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj.weight is quantized \(torch.int8\)"):
        lrp_prune.attribute(quantized, [batch])


def test_wanda_is_the_weight_times_the_norm_of_its_input() -> None:
    from lrp_prune.pruning import scorer

    model, batch = build("llama"), batch_for("llama")
    wanda = scorer("wanda", model)
    wanda.update(batch)
    scores = wanda.compute()
    for name, (weight, a, _) in tokens_of(model, batch).items():
        torch.testing.assert_close(
            scores[name], weight.abs() * (a.square().sum((0, 1)) / 2).sqrt(), rtol=1e-4, atol=1e-7
        )


def test_rows_are_those_of_the_layer_also_where_the_weight_is_transposed() -> None:
    model, batch = build("gpt2"), batch_for("gpt2")
    masks = lrp_prune.select(lrp_prune.attribute(model, [batch]), 0.5, scope="row")
    kept = masks["transformer.h.0.mlp.c_fc.weight"]  # [in, out]
    assert (kept.sum(0) == 16).all() and not (kept.sum(1) == 64).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_geometric_is_the_mean_of_relevance_and_contribution(name: str) -> None:
    model, batch = build(name).double(), batch_for(name)
    relevance = lrp_prune.attribute(model, [batch], composite="gradient", statistic="geometric")
    for weight_name, (weight, a, d) in tokens_of(model, batch).items():
        squared = (expected_statistic("squared_token", weight, a, d) / 2).sqrt()
        contribution = weight.abs() * (a.square().sum((0, 1)) / 2).sqrt()
        value = squared ** (2 / 3) * (contribution / contribution.mean()) ** (1 / 3)
        value = value.T if name == "gpt2" else value
        torch.testing.assert_close(relevance[weight_name].double(), value, rtol=1e-4, atol=1e-9)
        pieces = [relevance.read(weight_name, slice(at, at + 100)) for at in range(0, value.numel(), 100)]
        torch.testing.assert_close(torch.cat(pieces), relevance[weight_name].flatten())


def test_geometric_of_experts_and_convolutions() -> None:
    model, batch = build("mixtral"), batch_for("mixtral", 3, 9)
    options: dict[str, Any] = {"composite": "gradient", "matmul_dtype": None, "target": "next_token"}
    geometric = lrp_prune.attribute(model, [batch], statistic="geometric", **options)
    squared = lrp_prune.attribute(model, [batch], statistic="squared_token", **options)
    wanda = lrp_prune.attribute(model, [batch], statistic="input_norm", **options)
    for name in squared:
        expected = squared[name] ** (2 / 3) * (wanda[name] / wanda[name].mean()) ** (1 / 3)
        torch.testing.assert_close(geometric[name], expected, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(geometric.read(name, slice(7, 90)), expected.flatten()[7:90], rtol=1e-3, atol=1e-7)
    vision = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    data = (torch.randn(5, 2, 4, 4), torch.randint(3, (5,)))
    results = [
        lrp_prune.attribute(vision, [data], statistic=statistic, composite="gradient", matmul_dtype=None)
        for statistic in ("geometric", "squared_token", "input_norm")
    ]
    for name in results[1]:
        share = results[2][name] / results[2][name].mean()
        torch.testing.assert_close(
            results[0][name], results[1][name] ** (2 / 3) * share ** (1 / 3), rtol=1e-3, atol=1e-6
        )


def _cubed(granularity: str) -> tuple[lrp_prune.Relevance, nn.Sequential, Tensor]:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False)).double()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    statistic = lrp_prune.Statistic("cubed_token", power=3)
    return (
        lrp_prune.attribute(
            model, [x, x], lambda m, b: m(b).sum(), "gradient", statistic, granularity, matmul_dtype=None
        ),
        model,
        x,
    )


def test_a_statistic_of_ones_own_is_summed_read_merged_and_kept(tmp_path: Any) -> None:
    """The third root of the mean of cubes, of weights and of units; also from a file, and not with another one's of its name."""
    relevance, model, x = _cubed("weight")
    hidden, last = model[0](x).relu().detach(), model[2].weight.detach()
    by_token = (hidden[:, None, :] * last).abs() ** 3
    torch.testing.assert_close(relevance["2.weight"].double(), by_token.mean(0) ** (1 / 3), rtol=1e-6, atol=0)
    assert relevance.statistic == "cubed_token"
    relevance.save(tmp_path / "cubed")
    loaded = lrp_prune.Relevance.load(tmp_path / "cubed")
    torch.testing.assert_close((loaded + relevance)["2.weight"], relevance["2.weight"])
    units, model, x = _cubed("neuron")
    of_units = (model[0](x).relu() * model[2].weight.sum(0)).detach().abs() ** 3
    torch.testing.assert_close(next(iter(units.values())).double(), of_units.mean(0) ** (1 / 3), rtol=1e-6, atol=0)
    other = relevance._replace(relevance._sums, statistic=lrp_prune.Statistic("cubed_token", power=5))
    with pytest.raises(ValueError, match=r"cannot merge relevance with statistic .*power=3.*power=5"):
        relevance + other


def test_statistics_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"statistic 'odd': power must be .* got -1"):
        lrp_prune.Statistic("odd", power=-1)
    with pytest.raises(ValueError, match=r"power must be a whole number .* got 1.5"):
        lrp_prune.Statistic("odd", power=1.5)  # type: ignore[arg-type]
    for wrong in ({"power": 1}, {"power": 4}, {}, {"power": 2, "contributing": True}):
        with pytest.raises(ValueError, match=r"of inputs alone \(propagated=False\) there are squares"):
            lrp_prune.Statistic("inputs", propagated=False, **wrong)
    with pytest.raises(ValueError, match="contributing=True is a factor of powers"):
        lrp_prune.Statistic("signed_share", contributing=True)
    with pytest.raises(ValueError, match=r"0 where samples are summed first, got 2"):
        lrp_prune.Statistic("both", power=2, by_sample=True)
    with pytest.raises(
        ValueError, match=r"statistic must be one of \('signed', .*'geometric'\) or a Statistic, got 'odd'"
    ):
        lrp_prune.attribute(nn.Linear(2, 2), [torch.ones(1, 2)], statistic="odd")
    shares = lrp_prune.Statistic("shares", power=1, contributing=True)
    with pytest.raises(ValueError, match="statistic 'shares' is about weights, not heads: use 'squared_token'"):
        lrp_prune.attribute(nn.Linear(2, 2), [torch.ones(1, 2)], statistic=shares, granularity="head")
