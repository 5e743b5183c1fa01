"""Checkpointed, compiled and autocast models give the relevance of the plain one."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lrp_prune
from lrp_prune.relevance import Relevance
from tests.support.small_models import batch_for, build

EXACT: dict[str, Any] = {"matmul_dtype": None, "composite": "attnlrp", "statistic": "squared_token"}


class Checkpointed(nn.Sequential):
    """Layers that are recomputed in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


class GatedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + torch.nn.functional.silu(self.gate(y)) * self.up(y)


def _same(one: Relevance, two: Relevance) -> bool:
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("training", [False, True])
def test_recomputed_layers_see_the_rules(training: bool) -> None:
    plain = nn.Sequential(*(GatedLayer() for _ in range(3)))
    recomputed = Checkpointed(*copy.deepcopy(plain)).train(training)
    x, target = torch.randn(4, 8), lambda model, batch: model(batch).square().sum()
    one = lrp_prune.attribute(plain, [x], target=target, **EXACT)
    two = lrp_prune.attribute(recomputed, [x], target=target, **EXACT)
    gradient = lrp_prune.attribute(plain, [x], target=target, **{**EXACT, "composite": "gradient"})
    assert _same(one, two) and not _same(one, gradient)
    assert recomputed.training is training and all(parameter.grad is None for parameter in recomputed.parameters())


def test_hugging_face_checkpointing_changes_nothing() -> None:
    model, batch = build("llama"), batch_for("llama")
    expected = lrp_prune.attribute(model, [batch], **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in newer versions
        model.gradient_checkpointing_enable()
    assert _same(lrp_prune.attribute(model.train(), [batch], **EXACT), expected)


@pytest.mark.slow
def test_a_compiled_model_is_run_eagerly() -> None:
    model, batch = build("llama"), batch_for("llama")
    expected = lrp_prune.attribute(model, [batch], **EXACT)
    assert _same(lrp_prune.attribute(torch.compile(model, backend="eager"), [batch], **EXACT), expected)


@pytest.mark.parametrize("statistic", ["squared_token", "geometric"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sums_are_float32_in_autocast_and_in_bfloat16(name: str, statistic: str) -> None:
    options = {**EXACT, "statistic": statistic}
    model, batch = build(name), batch_for(name)
    expected = lrp_prune.attribute(model, [batch], **options)
    autocast = lrp_prune.attribute(
        model, [batch], forward_context=lambda: torch.autocast("cpu", torch.bfloat16), **options
    )
    half = lrp_prune.attribute(build(name, dtype=torch.bfloat16), [batch], **options)
    for other in (autocast, half):
        for weight in expected:
            assert other[weight].dtype == torch.float32
            assert torch.cosine_similarity(other[weight].flatten(), expected[weight].flatten(), dim=0) > 0.98


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("statistic", ["geometric", "squared_token", "abs_sample", "input_norm"])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_with_biases_work_in_every_precision(dtype: torch.dtype, statistic: str, transposed: bool) -> None:
    """Autocast casts biases in the forward alone, and what is kept for the backward has a precision of its own."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            last = nn.ConvTranspose2d(8, 8, 3, groups=2) if transposed else nn.Conv2d(8, 8, 3, groups=2)
            self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), last, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
            self.body(torch.zeros(1, 1, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    torch.manual_seed(0)
    model = Net().eval()
    x, y = 3 * torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0])
    options = {"target": "class", "composite": "epsilon", "statistic": statistic}
    expected = lrp_prune.attribute(model, [(x, y)], **options)
    mixed = lrp_prune.attribute(model, [(x, y)], forward_context=lambda: torch.autocast("cpu", dtype), **options)
    low = lrp_prune.attribute(copy.deepcopy(model).to(dtype), [(x.to(dtype), y)], **options)
    for other in (mixed, low):
        for name in expected:
            assert other[name].dtype == torch.float32
            assert torch.cosine_similarity(other[name].flatten(), expected[name].flatten(), dim=0) > 0.995, name


def test_sums_can_be_kept_on_another_device() -> None:
    model, batch = build("llama"), batch_for("llama")
    expected = lrp_prune.attribute(model, [batch], **EXACT)
    assert _same(lrp_prune.attribute(model, [batch], accumulate_on="cpu", **EXACT), expected)


def test_memory_is_bounded_by_the_sums() -> None:
    """Nothing is kept from batch to batch but four bytes a weight."""
    from lrp_prune.attribution import RelevanceAccumulator

    accumulator = RelevanceAccumulator(build("llama"), **EXACT)
    for _ in range(3):
        accumulator.update(batch_for("llama"))
    held = [
        tensor
        for statistic in accumulator.table._statistics.values()
        for tensor in vars(statistic).values()
        if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter)
    ]
    relevance = accumulator.compute()
    assert sum(tensor.nbytes for tensor in held) == 4 * sum(tensor.numel() for tensor in relevance.values())
