"""What is read from a Relevance: it changes nothing, lies on one device, and is saved whatever its tensors share."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sharding import sharded, together
from small_models import batch_for, build
from torch import nn

import lrp_prune
from lrp_prune import Relevance
from lrp_prune.attribution import RelevanceAccumulator
from lrp_prune.pruning import scorer
from lrp_prune.relevance import NORMALIZATIONS


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
