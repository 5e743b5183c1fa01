"""Adapters under masks: what is trained is what is merged, and each zero stays one."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from lrp_prune.names import named_parameters
from lrp_prune.pruning import Masks, save_pruned
from lrp_prune.pruning.sparse_adapters import whole_adapters
from tests.support.small_models import batch_for, build


class Layers(nn.Module):
    """One of each kind that LoRA is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(9, 8), nn.Conv1d(8, 6, 3, padding=1)
        self.point, self.head = nn.Conv1d(6, 6, 1), nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.point(self.conv(self.table(ids).transpose(1, 2)).tanh()).mean(-1)
        logits: Tensor = self.head(hidden)
        return logits


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    """With adapters that are no longer zero."""
    generator = torch.Generator().manual_seed(1)
    made: nn.Module = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, **options})).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return made


def layers(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return adapted(Layers(), **{"target_modules": ["table", "conv", "point", "head"], **options})


def half(model: nn.Module, names: list[str]) -> lrp_prune.Masks:
    generator = torch.Generator().manual_seed(2)
    own = named_parameters(model)
    masks = lrp_prune.Masks({name: torch.rand(own[name].shape, generator=generator) > 0.5 for name in names})
    masks.apply_(model)
    return masks


NAMES = ["table.weight", "conv.weight", "point.weight", "head.weight"]
IDS = torch.randint(9, (5, 7), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("options", [{}, {"lora_bias": True, "target_modules": ["conv", "head"]}])
def test_the_forward_is_that_of_the_masked_sum(options: dict[str, Any]) -> None:
    """By the plain layers with the weights written down."""
    model = layers(**options)
    reference = copy.deepcopy(model).merge_and_unload()
    masks = half(model, NAMES)
    masks.apply_(reference)
    with_all = model(IDS)
    lrp_prune.mask_adapters(model, masks)
    torch.testing.assert_close(model(IDS), reference(IDS))
    assert not torch.allclose(with_all, reference(IDS), rtol=1e-3)
    with whole_adapters(model):
        torch.testing.assert_close(model(IDS), with_all)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS), model.get_base_model()(IDS))


def test_gradients_are_those_of_the_masked_sum() -> None:
    model = layers()
    masks = half(model, NAMES)
    lrp_prune.mask_adapters(model, masks)
    model(IDS).square().sum().backward()
    layer = model.base_model.model.head
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    found = [a.grad, b.grad]
    hidden: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach()))
    outputs = model(IDS)
    scale = layer.scaling["default"]
    gradient = masks["head.weight"] * ((2 * outputs.detach()).T @ hidden[0])
    torch.testing.assert_close(found[0], scale * b.detach().T @ gradient)
    torch.testing.assert_close(found[1], scale * gradient @ a.detach().T)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_alone_keeps_each_zero_and_what_was_trained(safe: bool) -> None:
    model = layers(lora_dropout=0.1)
    masks = half(model, NAMES)
    lrp_prune.mask_adapters(model, masks)
    optimizer = torch.optim.AdamW([entry for entry in model.parameters() if entry.requires_grad], lr=0.05)
    for _ in range(5):
        loss = F.cross_entropy(model(IDS), torch.arange(5) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = model.eval()(IDS)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), trained)
    model.unmerge_adapter()
    torch.testing.assert_close(model(IDS), trained)
    merged = model.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(merged(IDS), trained)
    weights = dict(merged.named_parameters())
    assert sum(int((weights[name] == 0).sum()) for name in masks) == masks.num_pruned
    assert isinstance(merged.head, nn.Linear) and set(weights) == {name for name, _ in Layers().named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_language_models_are_scored_as_merged_ones_and_loaded_anew(name: str, tmp_path: Any) -> None:
    targets = ["c_attn", "c_proj"] if name == "gpt2" else ["q_proj", "down_proj"]
    options: dict[str, Any] = {"target_modules": targets, "fan_in_fan_out": name == "gpt2"}
    model, batch = adapted(build(name), **options).eval(), batch_for(name)
    with pytest.warns(UserWarning, match=r"mask_adapters\(model, masks\) makes them zero there"):
        masks = lrp_prune.prune(model, [batch], method="magnitude")
    lrp_prune.mask_adapters(model, masks)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    assert all(not merged.get_parameter(key)[~mask].any() for key, mask in masks.items())
    torch.testing.assert_close(model(**batch).logits, merged(**batch).logits)
    for statistic in ("abs_token", "signed"):
        found, expected = (
            lrp_prune.attribute(entry, [batch], target="next_token", statistic=statistic) for entry in (model, merged)
        )
        assert list(found) == list(expected) and not found.unscored
        for weight in expected:
            torch.testing.assert_close(found[weight], expected[weight], rtol=1e-4, atol=1e-9)
    model.save_pretrained(tmp_path)
    base = build(name).double()
    masks.apply_(base)
    again = peft.PeftModel.from_pretrained(base, tmp_path).double().eval()
    assert not torch.allclose(again(**batch).logits, merged(**batch).logits, rtol=1e-4)
    lrp_prune.mask_adapters(again, masks)
    torch.testing.assert_close(again(**batch).logits, merged(**batch).logits, rtol=1e-5, atol=1e-6)


def test_masks_are_replaced_and_several_adapters_all_have_them() -> None:
    model = layers()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["head"]))
    model = adapted_again(model)
    for _ in range(2):
        masks = half(model, ["head.weight", "point.weight"])
        lrp_prune.mask_adapters(model, masks)
    tighter = lrp_prune.Masks({name: mask & (torch.rand(mask.shape) > 0.5) for name, mask in masks.items()})
    tighter.apply_(model)
    lrp_prune.mask_adapters(model, tighter)
    merged = model.merge_and_unload(adapter_names=["default", "other"])
    assert not merged.head.weight[~tighter["head.weight"]].any()
    assert merged.head.weight[tighter["head.weight"]].all()


def adapted_again(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "other" in name:
                parameter.add_(0.2)
    return model.double()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "not simply added.*DoraLinearVariant"),
        (lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"]), "another kind than LoRA"),
        (None, "no weight of the masks has an adapter"),
    ],
)
def test_what_cannot_be_masked_is_said_by_name(config: Any, message: str) -> None:
    model = build("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    masks = lrp_prune.Masks({name: torch.rand(dict(model.named_parameters())[name].shape) > 0.5})
    changed = peft.get_peft_model(model, config()) if config is not None else model
    with pytest.raises(ValueError, match=message):
        lrp_prune.mask_adapters(changed, masks)


def test_what_is_merged_already_is_refused_and_scaling_adapters_need_nothing() -> None:
    model = layers()
    masks = half(model, NAMES)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"the adapter of table\.weight cannot be masked: it is merged already"):
        lrp_prune.mask_adapters(model, masks)
    config = peft.IA3Config(target_modules=["head"], feedforward_modules=[])
    with pytest.raises(ValueError, match="no weight of the masks has an adapter"):
        lrp_prune.mask_adapters(peft.get_peft_model(Layers(), config), masks)


def test_a_convolution_in_groups_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
    masks = lrp_prune.Masks({"0.weight": torch.rand(4, 2, 3) > 0.5})
    with pytest.raises(ValueError, match=r"the adapter of 0\.weight cannot be masked.*groups.*exclude="):
        lrp_prune.mask_adapters(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"])), masks)


@pytest.mark.parametrize("merged_by", ["mask_adapters", "merge_adapters"])
@pytest.mark.parametrize("adapted_layer", ["down_proj", "up_proj"])
def test_masks_of_units_go_on_to_the_merged_model(adapted_layer: str, merged_by: str, tmp_path: Path) -> None:
    """Without what units had in adapters, which is told."""
    bare, batch = build("llama"), {**batch_for("llama"), "labels": batch_for("llama")["input_ids"]}
    tuned = adapted(copy.deepcopy(bare), target_modules=[adapted_layer]).float()
    masks = lrp_prune.prune(tuned, [batch], 0.4, granularity="neuron", scope="layer", recalibrate=False)
    assert any("lora_" in name for name in masks)
    if merged_by == "mask_adapters":
        lrp_prune.mask_adapters(tuned, masks)
        merged = tuned.merge_and_unload()
    else:
        merged = lrp_prune.merge_adapters(tuned, masks)
    with pytest.warns(UserWarning, match=rf"has no adapters .*{adapted_layer}\.lora_\w\.default\.weight"):
        masks.apply_(bare)
    with pytest.warns(UserWarning, match="left out"):
        save_pruned(merged, tmp_path, masks)
    with pytest.warns(UserWarning, match="left out"):
        shrunk = lrp_prune.shrink(merged, masks, [batch])
    assert sum(layer.taken for layer in shrunk.layers) == 38
    weights = Masks({name: masks[name] for name in masks})
    with pytest.raises(KeyError, match="lora_"):
        weights.apply_(bare)
