"""What cannot be taken out stays and is told, and what cannot be shrunk is refused, with the model as it was."""

import copy
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.shrinking.proof import Proof
from tests.support.channel_nets import Net, pooled
from tests.support.sharding import sharded, together
from tests.support.shrinking import CLASSES, keeping, masked, masks_of, sizes, value
from tests.support.small_models import batch_for, build, llama


def test_what_would_break_stays_and_is_told() -> None:
    """Channels of one convolution are counted by hand, and those of the others are not."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 4, 1)
            self.register_buffer("scale", torch.rand(6, 1, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return pooled(self.c(self.b(self.a(x).relu() * self.scale).relu()))

    torch.manual_seed(0)
    model = Scaled().eval()
    x = torch.randn(3, 4, 5, 5)
    masks = masks_of(model, (x, CLASSES), "neuron")
    expected, before = masked(model, masks)(x), copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"not all units.*can be taken out \(b: the model does not run without them"):
        lrp_prune.shrink(model, masks, [x], strict=True)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before.parameters(), strict=True))
    shrunk = lrp_prune.shrink(model, masks, [x])
    torch.testing.assert_close(model(x), expected)
    assert list(shrunk.left) == ["b"] and model.a.out_channels == 6 and model.b.out_channels == 3
    assert re.search(r"still there, as zeros, in b: the\s+model does not run", str(shrunk).replace("\n  ", " "))


class Frozen(nn.Module):
    """Batch normalization by buffers alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(channels) + 0.5)
        self.register_buffer("mean", torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean[:, None, None]) * self.scale[:, None, None]


@pytest.mark.filterwarnings("ignore:.*no units that could be removed")
@pytest.mark.parametrize("between", [lambda: nn.BatchNorm2d(8, affine=False), lambda: Frozen(8), lambda: nn.PReLU(8)])
def test_filters_stay_before_what_has_an_untraced_entry_for_each(between: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    parts = {"a": nn.Conv2d(4, 8, 1), "between": between(), "b": nn.Conv2d(8, 6, 1), "c": nn.Conv2d(6, 4, 1)}
    model = Net(lambda n, x: pooled(n.c(n.b(n.between(n.a(x)).relu()).relu())), **parts).eval()
    x = torch.randn(3, 4, 5, 5)
    masks = masks_of(model, (x, CLASSES), "neuron")
    expected = masked(model, masks)(x)
    shrunk = lrp_prune.shrink(model, masks, [x])
    assert list(shrunk.left) == ["b"] and "does not run without them" in shrunk.left["b"]
    assert (model.a.out_channels, model.b.out_channels, model.c.in_channels) == (8, 3, 3)
    torch.testing.assert_close(model(x), expected)


class Noisy(nn.Module):
    """Adds a number that is drawn anew each time."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.a, self.b, self.draw = nn.Linear(4, 6), nn.Linear(6, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x + self.draw()).relu())


def test_outputs_that_differ_from_run_to_run_prove_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    model = Noisy(random.Random(0).random).eval()
    masks = keeping(model, (x, torch.zeros(5, dtype=torch.int64)), "neuron", {"b": [2, 5]})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"Noisy puts out something else when it is run .* again.*of its own"):
        lrp_prune.shrink(model, masks, [x])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.draw = lambda: torch.rand(4) + random.random()  # the same in each run
    assert lrp_prune.shrink(model, masks, [x]).taken == 4


def test_masks_of_the_model_as_it_was_are_refused() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(5, 4)
    masks = masks_of(model, (x, torch.zeros(5, dtype=torch.int64)), "neuron")
    lrp_prune.shrink(model, masks, [x])
    expected = model(x)
    with pytest.raises(
        ValueError, match=r"0\.weight has shape \(4, 4\), its mask \(8, 4\)|2\.weight has shape \(3, 4\)"
    ):
        lrp_prune.shrink(model, masks, [x])
    with pytest.raises(ValueError, match="nothing that is zero is a whole neuron"):
        lrp_prune.shrink(model, None, [x])
    assert torch.equal(model(x), expected)


def test_outputs_that_would_differ_are_seen() -> None:
    """A channel is read by its place: without the others it is another one, and everything would run."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x).relu()
            return self.b(hidden * (1 + torch.arange(hidden.shape[-1])))

    torch.manual_seed(0)
    model, x = Fixed().eval(), torch.randn(5, 4)
    masks = keeping(model, (x, torch.zeros(5, dtype=torch.int64)), "neuron", {"b": [2, 5]})
    with pytest.raises(ValueError, match=r"none of the units.*b: the outputs would be others without them"):
        lrp_prune.shrink(model, masks, [x])
    assert model.a.out_features == 6 and bool(model.a.weight.all())


def test_attention_of_torch_is_refused_by_name() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    model, x = nn.Sequential(layer, nn.Linear(16, 3)).eval(), torch.randn(2, 5, 16)
    relevance = lrp_prune.attribute(model, [x], target=value, granularity="head")
    masks = lrp_prune.select(relevance, 0.5, scope="layer")
    with pytest.raises(ValueError, match=r"0.self_attn.out_proj: the model does not run without them"):
        lrp_prune.shrink(model, masks, [x])
    neurons = lrp_prune.attribute(model, [x], target=value, granularity="neuron")
    masks = lrp_prune.select(neurons, 0.5, scope="layer")
    expected = masked(model, masks)(x)
    assert lrp_prune.shrink(model, masks, [x]).taken == 12
    torch.testing.assert_close(model(x), expected)
    assert tuple(layer.linear1.weight.shape) == (12, 16)


def test_one_unit_stays_where_all_are_dead() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(5, 4)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
        model[2].weight.zero_()
    shrunk = lrp_prune.shrink(model, None, [x])
    assert model[0].out_features == 1 and torch.equal(model(x), model[2].bias.expand(5, 3))
    assert "a layer has to have one" in shrunk.left["2"]


def test_masks_that_leave_something_of_each_unit_are_refused() -> None:
    model, batch = build("llama"), batch_for("llama")
    masks = lrp_prune.prune(copy.deepcopy(model), [batch], 0.5, "magnitude", recalibrate=False, progress=False)
    with pytest.raises(ValueError, match=r"nothing that the masks prune is a whole neuron.*granularity is 'weight'"):
        lrp_prune.shrink(model, masks, [batch])
    with pytest.raises(KeyError, match="no parameter"):
        lrp_prune.shrink(nn.Linear(2, 2), masks, [torch.randn(1, 2)])
    with pytest.raises(ValueError, match="there are no batches"):
        lrp_prune.shrink(model, masks, [])


def test_an_error_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build("llama"), batch_for("llama")
    masks, before = masks_of(model, batch, "neuron"), copy.deepcopy(model)
    other = {"input_ids": batch["input_ids"].flip(0)}
    difference = Proof.difference

    def failing(proof: Proof, module: nn.Module, batches: int | None = None) -> float:
        return difference(proof, module, batches) if batches else 1.0  # on another batch than the first

    monkeypatch.setattr(Proof, "difference", failing)
    with pytest.raises(RuntimeError, match=r"not those of the masked one for all batches.*nothing was changed"):
        lrp_prune.shrink(model, masks, [batch, other])
    assert sizes(model) == sizes(before) and model.config.to_dict() == before.config.to_dict()
    assert model.model.layers[0].mlp.down_proj.in_features == model.model.layers[0].mlp.intermediate_size == 48
    for mine, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated", "ignore:.*adapters")
def test_models_that_cannot_be_shrunk_are_refused_by_name() -> None:
    from peft import LoraConfig, get_peft_model

    model, batch = build("llama"), batch_for("llama")
    masks = masks_of(model, batch, "neuron")
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"up_proj.* have adapters.*merge_adapters"):
        lrp_prune.shrink(adapted, masks, [batch])
    lrp_prune.merge_adapters(adapted, masks)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="is quantized"):
        lrp_prune.shrink(quantized, None, [batch])
    corrected = lrp_prune.CorrectedModule(copy.deepcopy(model))
    with pytest.raises(ValueError, match="CorrectedModule"):
        lrp_prune.shrink(corrected, masks, [batch])


def test_weights_that_are_computed_from_others_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    masks = masks_of(model, (torch.randn(5, 4), torch.zeros(5, dtype=torch.int64)), "neuron")
    masks.apply_(model)
    nn.utils.parametrizations.weight_norm(model[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError):
        lrp_prune.shrink(model, None, [torch.randn(5, 4)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.processes
@pytest.mark.slow
def test_divided_and_copied_models_are_refused_by_name(tmp_path: Any) -> None:
    def refused(mesh: Any) -> list[str]:
        found = []
        model, batch = llama(), {"input_ids": torch.arange(14).view(2, 7)}
        masks = masks_of(model, batch, "neuron")
        for wrapped in (nn.parallel.DistributedDataParallel(copy.deepcopy(model)), sharded(model, mesh)):
            with pytest.raises(ValueError) as error:
                lrp_prune.shrink(wrapped, masks, [batch])
            found.append(str(error.value))
        return found

    copied, divided = together(refused, 2, tmp_path)[0]
    assert "shrink the model before it is wrapped" in copied
    assert "is divided among processes" in divided


def test_a_dropout_that_is_always_on_is_told_as_such() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(nn.functional.dropout(self.first(x).relu()))

    torch.manual_seed(0)
    model, batches = Dropping(), [(torch.randn(8, 8), torch.arange(8) % 3)]
    masks = lrp_prune.prune(model, batches, 0.4, granularity="neuron", recalibrate=False, progress=False)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="runs of the model differ by themselves, by random numbers"):
        lrp_prune.shrink(model, masks, batches)
    assert torch.equal(state, torch.get_rng_state())
