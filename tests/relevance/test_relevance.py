"""What is read from a Relevance: it changes nothing, lies on one device, and is saved whatever its tensors share."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrp_prune
from lrp_prune import Relevance
from lrp_prune.attribution import RelevanceAccumulator
from lrp_prune.pruning import scorer
from lrp_prune.relevance import NORMALIZATIONS
from lrp_prune.relevance.unscored import UNREACHED, UNUSED
from tests.support.sharding import sharded, together
from tests.support.small_models import batch_for, build


@pytest.mark.parametrize("by", NORMALIZATIONS)
def test_normalizing_keeps_signs_and_leaves_the_original(by: str) -> None:
    values = torch.tensor([1.0, -3.0, 0.5])
    for derived in (False, True):
        relevance = Relevance({"weight": values.clone()}, statistic="signed", derived=derived)
        normalized = relevance.normalized(by)
        assert torch.equal(relevance["weight"], values)
        assert torch.equal(normalized["weight"].sign(), values.sign())


def test_a_difference_that_is_normalized_keeps_its_signs() -> None:
    more, less = (
        Relevance({"weight": torch.tensor(values)}, statistic="signed") for values in ([1.0, 4.0], [3.0, 2.0])
    )
    difference = more - less
    torch.testing.assert_close(difference.normalized("max")["weight"], torch.tensor([-1.0, 1.0]))
    assert difference["weight"].tolist() == [-2.0, 2.0]


def test_a_single_batch_is_saved(tmp_path: Path) -> None:
    """Queries, keys and values, that read the same activation, have sums of their own."""
    model, batch = build("llama"), batch_for("llama")
    relevance = lrp_prune.attribute(model, [batch], composite="epsilon", statistic="geometric")
    relevance.save(tmp_path / "relevance.safetensors")
    loaded = Relevance.load(tmp_path / "relevance.safetensors")
    assert all(torch.equal(loaded[name], relevance[name]) for name in relevance)
    layer = "model.layers.0.self_attn."
    relevance.sums[f"{layer}q_proj.weight::inputs"].zero_()
    assert relevance.sums[f"{layer}k_proj.weight::inputs"].any()


@pytest.mark.processes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_in_half_precision_of_a_sharded_model_are_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    def check(mesh: Any) -> None:
        model = sharded(build("llama").to(dtype), mesh)
        relevance = scorer("magnitude", model).compute()
        relevance.save(tmp_path / "relevance.safetensors")

    together(check, 2, tmp_path)
    loaded, expected = Relevance.load(tmp_path / "relevance.safetensors"), scorer("magnitude", build("llama").to(dtype))
    assert all(torch.equal(loaded[name], values) for name, values in expected.compute().items())


@pytest.mark.parametrize("parked", [False, True])
def test_what_is_read_together_lies_on_one_device(parked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that are kept elsewhere than the weights, or that have been moved away."""
    monkeypatch.setattr(torch, "isfinite", lambda values: torch.tensor(True))  # nothing can be read from meta tensors
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    elsewhere = torch.device("meta")
    accumulator = RelevanceAccumulator(
        model, composite="epsilon", statistic="geometric", accumulate_on=None if parked else "meta"
    )
    accumulator.update((torch.randn(2, 4), torch.tensor([0, 1])))
    if parked:
        accumulator.table.park(list(accumulator.parameters), elsewhere)
    relevance = accumulator.compute()
    contributions = relevance._contributions
    tensors = [*relevance.sums.values(), *contributions.inputs.values(), *contributions.mean_weights.values()]
    assert {tensor.device for tensor in tensors} == {elsewhere}


def test_relevance_is_saved_with_its_description(tmp_path: Path) -> None:
    model, batch = build("llama"), batch_for("llama")
    for granularity in ("weight", "neuron", "head"):
        relevance = lrp_prune.attribute(model, [batch], granularity=granularity, statistic="squared_token").normalized()
        relevance.save(tmp_path / "relevance.safetensors")
        loaded = Relevance.load(tmp_path / "relevance.safetensors")
        assert list(loaded) == list(relevance)
        assert loaded.description() == relevance.description()
        assert loaded.members == relevance.members
        assert all(torch.equal(loaded[name], relevance[name]) for name in relevance)
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "relevance.safetensors").read_bytes()[:200])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Relevance.load(tmp_path / "broken.safetensors")
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_only_what_fits_together_is_merged() -> None:
    model, batch = build("llama"), batch_for("llama")
    signed = lrp_prune.attribute(model, [batch], statistic="signed")
    absolute = lrp_prune.attribute(model, [batch], statistic="abs_token")
    with pytest.raises(ValueError, match="statistic 'signed' and 'abs_token'"):
        signed + absolute
    with pytest.raises(ValueError, match="normalised"):
        signed + signed.normalized()
    with pytest.raises(ValueError, match="model"):
        signed + lrp_prune.attribute(build("mistral"), [batch], statistic="signed", target="next_token")
    with pytest.raises(ValueError, match="weights and of heads"):
        signed - lrp_prune.attribute(model, [batch], statistic="signed", granularity="head")
    difference = signed - 2.0 * signed
    assert all(torch.allclose(difference[name], -signed[name]) for name in signed)


@pytest.mark.parametrize("by", ["mean", "sum", "max", "total"])
def test_normalisation_scales_tensors_not_orders(by: str) -> None:
    relevance = lrp_prune.attribute(build("llama"), [batch_for("llama")])
    normalized = relevance.normalized(by)
    measure = {"mean": torch.mean, "sum": torch.sum, "max": torch.max}.get(by)
    if measure is not None:
        assert all(torch.isclose(measure(tensor.abs()), torch.tensor(1.0), rtol=1e-3) for tensor in normalized.values())
    else:
        assert sum(float(tensor.abs().sum()) for tensor in normalized.values()) == pytest.approx(1.0, rel=1e-3)
    with pytest.raises(ValueError, match="normalize must be one of"):
        relevance.normalized("median")


def test_values_are_read_in_pieces() -> None:
    relevance = lrp_prune.attribute(build("llama"), [batch_for("llama")], statistic="squared_token").normalized()
    for name, tensor in relevance.items():
        assert torch.equal(relevance.read(name, slice(5, 40)), tensor.flatten()[5:40])


def test_geometric_relevance_adds_up_and_is_saved(tmp_path: Path) -> None:
    model, ids = build("llama"), torch.randint(3, 50, (6, 7))
    options: dict[str, Any] = {"statistic": "geometric", "composite": "epsilon", "matmul_dtype": None}
    together = lrp_prune.attribute(model, [{"input_ids": ids}], **options)
    parts = [lrp_prune.attribute(model, [{"input_ids": part}], **options) for part in ids.split(2)]
    merged = parts[0] + parts[1] + parts[2]
    reduced = parts[0].with_sums({name: sum(part.sums[name] for part in parts) for name in parts[0].sums}, 6)
    merged.save(tmp_path / "relevance.safetensors")
    loaded = Relevance.load(tmp_path / "relevance.safetensors")
    for name in together:
        torch.testing.assert_close(merged[name], together[name], rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(reduced[name], together[name], rtol=1e-4, atol=1e-8)
        assert torch.equal(loaded[name], merged[name])
    with pytest.raises(ValueError, match="about weights, not heads"):
        lrp_prune.attribute(model, [{"input_ids": ids}], statistic="geometric", granularity="head")


def test_a_tensor_that_one_set_does_not_reach_is_merged_as_zero() -> None:
    one, two = torch.ones(2, 3), torch.full((2, 3), 2.0)
    both = Relevance({"a": one, "b": two}, num_samples=1)
    partial = Relevance({"a": one}, parameter_shapes={"a": (2, 3), "b": (2, 3)}, unscored={"b": UNUSED})
    merged = both + partial
    assert torch.equal(merged["a"], torch.ones(2, 3)) and torch.equal(merged["b"], torch.ones(2, 3))
    assert merged.num_samples == 2 and merged.unscored == {} and (partial + both).unscored == {}
    unreached = Relevance({"a": one}, parameter_shapes={"a": (2, 3), "b": (2, 3)}, unscored={"b": UNREACHED})
    assert (partial + unreached).unscored == (unreached + partial).unscored == {"b": UNREACHED}
    with pytest.raises(ValueError, match="'b' is unscored and has no shape"):
        Relevance({"a": one}, unscored={"b": UNUSED})
    other = Relevance({"a": one}, num_samples=1)  # the same tensors, another list of unscored ones
    assert torch.equal((partial + other)["a"], torch.ones(2, 3))
    with pytest.raises(ValueError, match="shapes"):
        both + Relevance({"a": torch.ones(3, 2), "b": two})
    with pytest.raises(ValueError, match="'b' is in one of them only"):
        both + Relevance({"a": one, "c": two})
