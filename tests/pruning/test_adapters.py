"""Models with adapters: the same names, the weights that are used, and zeros that outlive merging."""

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.attribution.candidates import candidates
from lrp_prune.names import named_modules, named_parameters, resolve
from lrp_prune.pruning import METHODS, scorer
from lrp_prune.relevance.statistics import OF_RELEVANCE
from tests.support.small_models import batch_for, build

QUERIES = ["*.q_proj"]


def _adapted(name: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """A model with adapters that are no longer zero, and change what it does."""
    defaults = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    if name == "gpt2":
        defaults = {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    torch.manual_seed(0)
    model = peft.get_peft_model(build(name), peft.LoraConfig(**{**defaults, **options})).to(dtype)
    return _shaken(model).eval()


def _shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name or "modules_to_save" in parameter_name or "ia3" in parameter_name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def _merged(model: nn.Module) -> nn.Module:
    merged: nn.Module = copy.deepcopy(model).merge_and_unload()
    return merged.eval()


def _attribute(model: nn.Module, batch: Any, **options: Any) -> lrp_prune.Relevance:
    return lrp_prune.attribute(model, [batch], target="next_token", **options)


def _prune(model: nn.Module, batch: Any, method: str = "lrp", **options: Any) -> lrp_prune.Masks:
    explained = {"target": "next_token"} if method in ("lrp", "gradient") else {}
    explained |= {"target": options.pop("target")} if "target" in options else {}
    return lrp_prune.prune(model, [batch], method=METHODS[method](**explained), **options)


def _quietly(*args: Any, **options: Any) -> lrp_prune.Masks:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _prune(*args, **options)


class Holder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def test_weights_are_called_the_same_with_and_without_adapters() -> None:
    bare, model = build("llama"), _adapted(modules_to_save=["lm_head"])
    own = {name: tuple(entry.shape) for name, entry in named_parameters(model).items() if "lora_" not in name}
    del own["lm_head.original_module.weight"]
    assert own == {name: tuple(entry.shape) for name, entry in named_parameters(bare).items()}
    assert list(candidates(model)) == list(candidates(bare))
    assert (
        named_modules(model)["model.layers.0.self_attn.q_proj"].lora_A is not None
    )  # the outer one, whose output is the sum
    assert named_modules(model)[""] is model
    held = named_parameters(Holder(model))
    assert "model.model.layers.0.self_attn.q_proj.weight" in held and "model.lm_head.weight" in held
    trained = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert named_parameters(model)["lm_head.weight"] is trained
    model.disable_adapter_layers()
    assert named_parameters(model)["lm_head.weight"] is not trained
    compiled = torch.compile(_adapted(), backend="eager")
    assert list(candidates(compiled)) == list(candidates(bare))


def test_a_name_of_the_users_own_is_left_alone() -> None:
    model = nn.ModuleDict({"base_layer": nn.Linear(2, 2), "base_model": nn.Sequential(nn.Linear(2, 2))})
    assert list(candidates(model)) == ["base_layer.weight", "base_model.0.weight"]


@pytest.mark.slow
def test_masks_go_from_the_bare_model_to_the_adapted_one_and_back() -> None:
    bare, model = build("llama"), _adapted()
    masks = _prune(build("llama"), batch_for("llama"), sparsity=0.5)
    masks.apply_(model)
    for name, parameter in resolve(masks, model).items():
        assert not parameter[~masks[name]].any()
    of_adapted = _quietly(_adapted(), batch_for("llama"), sparsity=0.5)
    assert set(of_adapted) == set(masks)
    of_adapted.apply_(Holder(bare))
    assert all(not bare.get_parameter(name)[~mask].any() for name, mask in of_adapted.items())


@pytest.mark.parametrize("statistic", [*OF_RELEVANCE, "wanda", "magnitude"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_with_adapters_are_scored_as_merged_ones(name: str, statistic: str) -> None:
    model, batch = _adapted(name), batch_for(name)
    found, expected = (
        _scores(entry, statistic, batch) if statistic in METHODS else _attribute(entry, batch, statistic=statistic)
        for entry in (model, _merged(model))
    )  # fmt: skip
    assert list(found) == list(expected) and not found.unscored
    for weight in expected:
        torch.testing.assert_close(found[weight], expected[weight], rtol=1e-4, atol=1e-9)


def _scores(model: nn.Module, method: str, batch: Any) -> lrp_prune.Relevance:
    scores = scorer(method, model)
    scores.update(batch)
    return scores.compute()


def test_several_active_adapters_are_added_up() -> None:
    model, batch = _adapted(), batch_for("llama")
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    model.add_adapter("idle", peft.LoraConfig(r=3, target_modules=["q_proj"]))
    _shaken(model).to(torch.float64)
    model.base_model.set_adapter(["default", "other"])
    found = _attribute(model, batch)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "other"]).eval()
    expected = _attribute(merged, batch)
    for weight in expected:
        torch.testing.assert_close(found[weight], expected[weight], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_adapters_that_are_off_or_merged_already_are_not_added_again(state: str) -> None:
    model, batch = _adapted(), batch_for("llama")
    expected = _attribute(build("llama").double() if state == "disabled" else _merged(model), batch)
    if state == "disabled":
        model.disable_adapter_layers()
    else:
        model.merge_adapter()
    found = _attribute(model, batch)
    for weight in expected:
        torch.testing.assert_close(found[weight], expected[weight], rtol=1e-4, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_zeros_outlive_merging_by_the_documented_call(name: str, method: str) -> None:
    model, batch = _adapted(name), batch_for(name)
    with pytest.warns(UserWarning, match=r"have adapters.*merge_adapters\(model, masks\)"):
        masks = _prune(model, batch, sparsity=0.5, method=method)
    used = {key: value.detach() for key, value in named_parameters(_merged(model)).items()}
    assert sum(int((used[key] == 0).sum()) for key in masks) < masks.num_pruned  # what merge_and_unload alone leaves
    merged = lrp_prune.merge_adapters(model, masks)
    assert type(merged) is type(build(name)) and not any("lora" in key for key in merged.state_dict())
    found = named_parameters(merged)
    assert masks.sparsity == 0.5 and sum(int((found[key] == 0).sum()) for key in masks) == masks.num_pruned
    for key, mask in masks.items():
        assert not found[key][~mask].any() and torch.equal(found[key][mask], used[key][mask])
    assert all(torch.equal(found[key], used[key]) for key in found if key not in masks)


def test_weights_beside_adapters_can_be_named_and_so_can_the_adapters() -> None:
    model, batch = _adapted(), batch_for("llama")
    with pytest.raises(
        ValueError, match=r"has adapters.*include=\['\*\.down_proj', '\*\.q_proj'\].*include=\['\*\.lora_\*'\]"
    ):
        _prune(model, batch, trainable_only=True)
    assert set(candidates(model, QUERIES, trainable_only=True)) == {
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)
    }
    adapters = _prune(model, batch, include=["*.lora_*"], trainable_only=True, scope="layer")
    assert len(adapters) == 8 and adapters.sparsity == 0.5
    with pytest.raises(ValueError, match="belongs to an adapter"):
        lrp_prune.merge_adapters(model, adapters)


def test_what_cannot_be_merged_under_masks_is_said_before_anything_is() -> None:
    masks = _quietly(_adapted(), batch_for("llama"), include=QUERIES)
    with pytest.raises(TypeError, match=r"got Holder: it is at 'model'"):
        lrp_prune.merge_adapters(Holder(_adapted()), masks)
    with pytest.raises(TypeError, match=r"got LlamaForCausalLM$"):
        lrp_prune.merge_adapters(build("llama"), masks)
    model = _adapted("gpt2")
    with pytest.raises(KeyError, match="has no parameter"):
        lrp_prune.merge_adapters(model, masks)
    small = lrp_prune.Masks({name: torch.ones(3, 3, dtype=torch.bool) for name in masks})
    model = _adapted()
    with pytest.raises(ValueError, match=r"has shape \(32, 32\), its mask \(3, 3\)"):
        lrp_prune.merge_adapters(model, small)
    assert any("lora" in name for name in model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
            r"not simply added to it \(DoraLinearVariant\)",
        ),
        (lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"]), "adapter of another kind than LoRA"),
        (lambda: peft.OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj"]), "adapter of another kind than LoRA"),
    ],
)
@pytest.mark.parametrize("method", ["lrp", "magnitude"])
def test_other_adapters_are_refused_by_name(config: Any, message: str, method: str) -> None:
    torch.manual_seed(0)
    model, batch = peft.get_peft_model(build("llama"), config()).eval(), batch_for("llama")
    with pytest.raises(ValueError, match=rf"cannot prune model\.layers\.\*\.self_attn\.q_proj\.weight \(.*{message}"):
        _prune(model, batch, method=method)
    relevance = _attribute(model, batch)
    assert len(relevance.unscored) == 2 and all("q_proj" in name for name in relevance.unscored)
    assert _prune(model, batch, method=method, exclude=QUERIES).sparsity == 0.5


@pytest.mark.slow
def test_scaling_adapters_need_nothing() -> None:
    """IA3 scales what a layer takes or gives: relevance at its weight is that of the merged one, and a zero stays one."""
    config = peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    model, batch = _shaken(peft.get_peft_model(build("llama"), config)).double().eval(), batch_for("llama")
    found, expected = (_attribute(entry, batch, statistic="abs_token") for entry in (model, _merged(model)))
    for weight in expected:
        torch.testing.assert_close(found[weight], expected[weight], rtol=1e-4, atol=1e-9)
    masks = _prune(model, batch, sparsity=0.5)
    merged = model.merge_and_unload()
    assert all(not merged.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_embeddings_and_heads_beside_the_adapters() -> None:
    """An adapter on an embedding, and a head that is trained as a whole: by name, as ever."""
    model, batch = _adapted(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]), batch_for("llama")
    merged = _merged(model)
    options: dict[str, Any] = {"include": ["model.embed_tokens", "lm_head", *QUERIES], "statistic": "abs_token"}
    found, expected = _attribute(model, batch, **options), _attribute(merged, batch, **options)
    assert list(found) == list(expected)
    for weight in expected:
        torch.testing.assert_close(found[weight], expected[weight], rtol=1e-4, atol=1e-9)
    masks = _quietly(model, batch, include=["lm_head", *QUERIES])
    used = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert not used[~masks["lm_head.weight"]].any()
    result = lrp_prune.merge_adapters(model, masks)
    assert not result.lm_head.weight[~masks["lm_head.weight"]].any() and masks.sparsity == 0.5


def test_adapters_without_a_peft_model_around() -> None:
    """``inject_adapter_in_model`` and transformers' ``add_adapter`` put layers into the model itself."""
    model = build("llama")
    names = list(candidates(model))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    assert list(candidates(_shaken(model))) == names
    masks = _quietly(model, batch_for("llama"), sparsity=0.5)
    assert masks.sparsity == 0.5 and list(masks) == names


def test_attention_that_is_adapted_as_a_whole() -> None:
    """PEFT merges into ``nn.MultiheadAttention`` for the time of each forward: its weights are two."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.attention(x, x, x)[0])
            return result

    model = _shaken(peft.get_peft_model(Model(), peft.LoraConfig(r=2, target_modules=["attention"]))).eval()
    with pytest.raises(ValueError, match=r"cannot prune attention\.in_proj_weight"):
        _prune(model, torch.randn(2, 3, 8), target=lambda model, batch: model(batch).sum())
