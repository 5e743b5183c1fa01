"""Shrinking: what masks of units prune is taken out, and the model computes what it computed under them."""

import copy
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrp_prune
from tests.support.shrinking import keeping, masked, masks_of, sizes
from tests.support.small_models import batch_for, build, forward, llama

NEURONS = {"llama": 24, "gpt2": 64, "phi3": 24, "gemma": 24, "opt": 24, "bert": 24, "vit": 24, "t5": 24, "bart": 24}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEURONS)
def test_neurons_of_transformers_go_and_the_configuration_says_so(name: str, tmp_path: Any) -> None:
    model, batch = build(name), batch_for(name)
    only = {"exclude": ["*pooler*"]} if name == "bert" else {}  # as wide as the stream, whatever goes
    masks = masks_of(model, batch, "neuron", **only)
    expected = forward(masked(model, masks), batch)
    shrunk = lrp_prune.shrink(model, masks, [batch], uniform=True)
    torch.testing.assert_close(forward(model, batch), expected, rtol=1e-4, atol=1e-5)
    assert {layer.units - layer.taken for layer in shrunk.layers} == {NEURONS[name]}
    assert not shrunk.left and shrunk.loads_plainly
    shrunk.save(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert sizes(again) == sizes(model)
    assert torch.equal(forward(again, batch), forward(model, batch))


@pytest.mark.slow
def test_layers_of_a_kind_lose_the_same_number_if_it_is_to_be_uniform() -> None:
    model, batch = build("llama"), batch_for("llama")
    kept = {"0.mlp.down_proj": list(range(40)), "1.mlp.down_proj": list(range(10))}
    masks = keeping(model, batch, "neuron", kept)
    expected = forward(masked(model, masks), batch)
    uneven, even = (copy.deepcopy(model) for _ in range(2))
    assert "layers differ in" in str(lrp_prune.shrink(uneven, masks, [batch]))
    assert [layer.mlp.down_proj.in_features for layer in uneven.model.layers] == [40, 10]
    assert uneven.config.intermediate_size == 48
    shrunk = lrp_prune.shrink(even, masks, [batch], uniform=True)
    assert [layer.mlp.down_proj.in_features for layer in even.model.layers] == [40, 40]
    assert even.config.intermediate_size == 40 and shrunk.loads_plainly
    assert list(shrunk.left) == ["model.layers.1.mlp.down_proj"]
    for each in (uneven, even):
        torch.testing.assert_close(forward(each, batch), expected, rtol=1e-4, atol=1e-5)


def test_what_is_left_can_be_divided_if_it_is_to_be() -> None:
    model, batch = llama(), {"input_ids": torch.arange(14).view(2, 7)}
    masks = keeping(model, batch, "neuron", {"0.mlp.down_proj": list(range(13)), "1.mlp.down_proj": list(range(23))})
    expected = masked(model, masks)(**batch).logits
    shrunk = lrp_prune.shrink(model, masks, [batch], multiple_of=8)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [16, 24]
    assert {name: "multiple_of=8" in why for name, why in shrunk.left.items()} == {
        f"model.layers.{layer}.mlp.down_proj": True for layer in (0, 1)
    }
    with pytest.raises(ValueError, match="multiple_of"):
        lrp_prune.shrink(model, None, [batch], multiple_of=0)


class Lightning(lightning.LightningModule):
    """Holds a model, as a training does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.model(**batch).loss


def test_the_model_in_a_lightning_module_is_shrunk_and_trains_on() -> None:
    inner, batch = llama(), {"input_ids": torch.arange(14).view(2, 7)}
    module = Lightning(inner)
    masks = masks_of(inner, batch, "neuron")
    expected = masked(inner, masks)(**batch).logits
    assert lrp_prune.shrink(module, masks, [batch]).taken == 24
    torch.testing.assert_close(module.model(**batch).logits, expected)
    module.model.train()
    module.training_step({**batch, "labels": batch["input_ids"]}, 0).backward()
    assert all(
        parameter.grad is not None and parameter.grad.shape == parameter.shape for parameter in inner.parameters()
    )


def test_tied_weights_are_cut_in_all_of_their_places() -> None:
    """Two layers that share the weight by which they read, and the same neurons are dead in both."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.again, self.head = (nn.Linear(*size) for size in ((4, 8), (8, 4), (8, 4), (4, 2)))
            self.again.weight = self.down.weight

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.up(x).relu()
            return self.head(self.down(hidden) * self.again(hidden))

    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randn(5, 4)
    masks = keeping(model, (x, torch.zeros(5, dtype=torch.int64)), "neuron", {"down": [1, 4, 6]})
    expected = masked(model, masks)(x)
    lrp_prune.shrink(model, masks, [x])
    torch.testing.assert_close(model(x), expected)
    assert model.down.weight is model.again.weight and tuple(model.down.weight.shape) == (4, 3)
    assert model.again.in_features == 3


def test_whether_parameters_are_trained_is_kept_and_nothing_else_changes() -> None:
    model, batch = build("llama"), batch_for("llama")
    model.model.layers[0].requires_grad_(False)
    model.train()
    masks, before = masks_of(model, batch, "neuron"), copy.deepcopy(model)
    state = torch.get_rng_state()
    lrp_prune.shrink(model, masks, [batch])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(module.training for module in model.modules())
    after = dict(model.named_parameters())
    for name, parameter in before.named_parameters():
        assert after[name].requires_grad == parameter.requires_grad and after[name].grad is None
        assert torch.equal(after[name], parameter) or ".mlp." in name


def test_what_was_measured_is_printed_and_the_smaller_model_is_left() -> None:
    model = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 64)).eval()
    x = torch.randn(256, 64)
    masks = masks_of(model, (x, torch.zeros(256, dtype=torch.int64)), "neuron", 0.9)
    shrunk = lrp_prune.shrink(model, masks, [x], measure=3)
    assert model[0].out_features == 205
    assert shrunk.speed is not None and shrunk.speed.ratio > 1.2
    assert shrunk.speed.memory_after < 0.2 * shrunk.speed.memory_before
    assert f"{shrunk.speed.ratio:.2f} times faster" in " ".join(str(shrunk).split())
    for times in (-1, True, 1.5):
        with pytest.raises(ValueError, match="measure must be an integer of at least 0"):
            lrp_prune.shrink(model, masks, [x], measure=times)


def test_numbers_of_modules_change_if_the_outputs_need_it() -> None:
    """One number is the width of the hidden layer, and another one happens to be as large."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = self.width = 8
            self.told = (8, 3)
            self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            gate, value = self.up(x).split(self.hidden, dim=-1)
            return self.down(gate.sigmoid() * value)[:, : self.width]

    torch.manual_seed(0)
    model, x = Split().eval(), torch.randn(5, 8)
    masks = keeping(model, (x, torch.zeros(5, dtype=torch.int64)), "neuron", {"down": [0, 3, 4, 5, 7]})
    expected = masked(model, masks)(x)
    shrunk = lrp_prune.shrink(model, masks, [x])
    torch.testing.assert_close(model(x), expected)
    assert (model.hidden, model.width, model.up.out_features, model.down.in_features) == (5, 8, 10, 5)
    assert shrunk.numbers["hidden"] == 5 and "width" not in shrunk.numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_as_it_rounds(dtype: torch.dtype) -> None:
    model, batch = build("llama").to(dtype), batch_for("llama")
    shrunk = lrp_prune.shrink(model, masks_of(model, batch, "neuron"), [batch])
    assert shrunk.taken == 48 and shrunk.difference < shrunk.tolerance == 0.05
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_forward_says_how_the_model_is_run() -> None:
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

        def forward(self, left: Tensor, right: Tensor, *, scale: float) -> Tensor:
            return F.softmax(self.net(left - right) * scale, -1)

    model, batch = Scored().eval(), {"a": torch.randn(5, 4), "b": torch.randn(5, 4)}

    def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["a"], batch["b"], scale=2.0)

    entries = {name: torch.ones_like(each, dtype=torch.bool) for name, each in model.named_parameters()}
    dead = [1, 3]
    entries["net.0.weight"][dead] = False
    entries["net.0.bias"][dead] = False
    entries["net.2.weight"][:, dead] = False
    shrunk = lrp_prune.shrink(model, lrp_prune.Masks(entries), [batch], forward=run)
    assert shrunk.taken == 2 and model.net[0].out_features == 4


class Slots:
    """What a model returns of a class of its own."""

    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def test_outputs_in_an_object_are_compared() -> None:
    class Wrapped(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return Slots(super().forward(x))

    torch.manual_seed(0)
    model, batches = Wrapped(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), [(torch.randn(5, 6), torch.arange(5) % 3)]
    masks = lrp_prune.prune(model, batches, 0.5, granularity="neuron", recalibrate=False)
    lrp_prune.shrink(model, masks, batches)
    assert model[0].out_features == 4


def test_adapters_that_were_merged_under_the_masks_are_no_obstacle() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, batch = llama(), {"input_ids": torch.arange(14).view(2, 7)}
    masks = masks_of(model, batch, "neuron")
    adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj", "down_proj"], init_lora_weights=False))
    merged = lrp_prune.merge_adapters(adapted, masks)
    expected = masked(merged, masks)(**batch).logits
    assert lrp_prune.shrink(merged, masks, [batch]).taken == 24
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_shrunk_model_is_pruned_and_shrunk_again() -> None:
    model, batch = llama(), {"input_ids": torch.arange(14).view(2, 7)}
    for left in (12, 6):
        masks = masks_of(model, batch, "neuron")
        expected = masked(model, masks)(**batch).logits
        lrp_prune.shrink(model, masks, [batch])
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        assert model.config.intermediate_size == left


def test_masks_by_the_callbacks_and_by_relevance_are_taken_out_alike() -> None:
    """What decides is what is left of a unit, and not how masks were made."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batch = (torch.randn(16, 4), torch.randint(3, (16,)))
    masks = lrp_prune.prune(model, [batch], 0.5, granularity="neuron", recalibrate=True, progress=False)
    loaded = lrp_prune.Masks.from_state_dict(masks.state_dict())
    expected = model(batch[0])
    assert lrp_prune.shrink(model, loaded, [batch]).taken == 4
    torch.testing.assert_close(model(batch[0]), expected)


def test_a_model_that_was_shrunk_in_inference_mode_can_be_trained() -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), [torch.randn(16, 4)]
    with torch.inference_mode():
        masks = lrp_prune.prune(model, batches, 0.5, "magnitude", granularity="neuron", recalibrate=False)
        lrp_prune.shrink(model, masks, batches)
    model(batches[0]).sum().backward()
    assert model[0].weight.shape[0] < 8 and model[0].weight.grad is not None
