"""Layers recomputed in the backward pass, by either kind of checkpoint: same relevance, less memory, nothing left behind."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import lrp_prune
from lrp_prune.planning.live import Live
from lrp_prune.relevance import Relevance
from tests.support.small_models import batch_for, build, llama

EXACT: dict[str, Any] = {"matmul_dtype": None, "composite": "attnlrp", "statistic": "squared_token"}


class Recomputed(nn.Sequential):
    """Layers that are recomputed in the backward pass."""

    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up, self.dropout = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.dropout(torch.nn.functional.silu(self.gate(y)) * self.up(y))


@contextmanager
def as_before() -> Iterator[None]:
    original = torch.utils.checkpoint.CheckpointFunction
    yield
    assert torch.utils.checkpoint.CheckpointFunction is original


def assert_same(one: Relevance, two: Relevance) -> None:
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def explained(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().sum()


@pytest.mark.parametrize("training", [False, True])
def test_reentrant_checkpoints_see_the_rules(training: bool) -> None:
    plain = nn.Sequential(*(Layer() for _ in range(3)))
    recomputed = Recomputed(*copy.deepcopy(plain)).train(training)
    x = torch.randn(4, 8)
    with as_before():
        one = lrp_prune.attribute(plain, [x], target=explained, **EXACT)
        two = lrp_prune.attribute(recomputed, [x], target=explained, **EXACT)
    assert_same(one, two)
    gradient = lrp_prune.attribute(plain, [x], target=explained, **{**EXACT, "composite": "gradient"})
    assert not all(torch.equal(one[name], gradient[name]) for name in one)


def test_sequential_checkpoints() -> None:
    layers = nn.Sequential(*(Layer() for _ in range(4)))

    class InParts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(self.layers, 2, x, use_reentrant=True)

    x = torch.randn(4, 8)
    one = lrp_prune.attribute(layers, [x], target=explained, **EXACT)
    two = lrp_prune.attribute(InParts(), [x], target=explained, **EXACT)
    assert all(torch.equal(one[name], two[f"layers.{name}"]) for name in one)


def test_another_reentrant_checkpoint_is_refused_by_name() -> None:
    original = torch.utils.checkpoint.CheckpointFunction

    class Foreign(Recomputed):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = original.apply(layer, True, x)
            return x

    model = Foreign(Layer(), Layer())
    with as_before(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="reentrant checkpoint that is not torch's own"):
            lrp_prune.attribute(model, [torch.randn(4, 8, requires_grad=True)], target=explained, **EXACT)
    assert all(parameter.grad is None for parameter in model.parameters())


def enable(model: Any, reentrant: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in newer versions
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_hugging_face_checkpointing_changes_nothing(name: str, training: bool, reentrant: bool) -> None:
    """OPT draws dropout in the layer's own forward."""
    model, batch = build(name), batch_for(name)
    expected = lrp_prune.attribute(model, [batch], **EXACT)
    enable(model, reentrant)
    model.train(training)
    state = [(module.training, vars(module).get("_gradient_checkpointing_func")) for module in model.modules()]
    with as_before():
        assert_same(lrp_prune.attribute(model, [batch], **EXACT), expected)
    assert state == [(module.training, vars(module).get("_gradient_checkpointing_func")) for module in model.modules()]


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_its_benefit_in_evaluation_mode(reentrant: bool) -> None:
    """Counted in bytes alive at the same time: a deeper model costs what a layer's input costs, not its activations."""
    pytest.importorskip("transformers")
    ids = torch.randint(50, (4, 64))

    def peak(layers: int, checkpointing: bool) -> int:
        torch.manual_seed(0)
        model = llama(vocab_size=50, intermediate_size=128, num_hidden_layers=layers, num_key_value_heads=2).eval()
        if checkpointing:
            enable(model, reentrant)
        accumulator = lrp_prune.attribution.RelevanceAccumulator(model, **EXACT)
        accumulator.update({"input_ids": ids})
        with Live() as live:
            accumulator.update({"input_ids": ids})
        return live.peak

    stored, recomputed = (peak(8, checkpointing) - peak(2, checkpointing) for checkpointing in (False, True))
    layer_input = 6 * 4 * 64 * 16 * 4
    assert stored > 8 * layer_input
    assert recomputed <= layer_input
