"""Names survive wrappers, and masks find their parameters wherever the model is."""

import pytest
import torch
from torch import nn

import lrp_prune
from lrp_prune.names import canonical_name, matches, named_modules, named_parameters, resolve, unwrap


class Holder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))


def test_wrapper_segments_are_removed() -> None:
    assert canonical_name("_orig_mod.layers.0._checkpoint_wrapped_module.weight") == "layers.0.weight"
    compiled = torch.compile(_model(), backend="eager")
    assert list(named_parameters(compiled)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(named_modules(compiled)) == ["", "0", "1", "2"]
    assert unwrap(compiled) is compiled._orig_mod
    inside = Holder(torch.compile(_model(), backend="eager"))
    assert next(iter(named_parameters(inside))) == "model.0.weight"


def test_tied_parameters_have_their_first_name() -> None:
    model = _model()
    tied = nn.ModuleDict({"one": model, "two": model})
    assert list(named_parameters(tied)) == ["one.0.weight", "one.0.bias", "one.2.weight", "one.2.bias"]
    assert resolve(["two.0.weight"], tied)["two.0.weight"] is model[0].weight


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("layers.0.mlp.up_proj.weight", "*.up_proj.weight", True),
        ("layers.0.mlp.up_proj.weight", "*.up_proj", True),
        ("layers.0.mlp.up_proj.weight", "layers.0", True),
        ("layers.10.mlp.up_proj.weight", "layers.1", False),
        ("layers.0.mlp.up_proj.weight", "up_proj", False),
        ("lm_head.weight", "lm_head", True),
    ],
)
def test_patterns_match_names_and_the_modules_around_them(name: str, pattern: str, expected: bool) -> None:
    assert matches(name, [pattern]) is expected
    assert not matches(name, None) and not matches(name, [])


def test_a_single_string_is_no_list_of_patterns() -> None:
    model, batch = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), (torch.ones(1, 2), torch.zeros(1, dtype=torch.long))
    for name in ("include", "exclude"):
        for granularity in ("weight", "neuron"):
            with pytest.raises(ValueError, match=f"{name} must be a list of name patterns such as .* got '0'"):
                lrp_prune.prune(model, [batch], 0.5, granularity=granularity, **{name: "0"})
    with (
        pytest.raises(ValueError, match=r"latent must be a list of name patterns such as .* got '0'"),
        lrp_prune.attributing(model, latent="0"),
    ):
        pass


def test_names_that_fit_several_modules_are_refused() -> None:
    parts = nn.ModuleDict({"encoder": _model(), "decoder": _model()})
    with pytest.raises(KeyError, match=r"may mean 'encoder\.0\.weight' or 'decoder\.0\.weight' of ModuleDict"):
        resolve(["0.weight", "2.weight"], parts)
    assert resolve(["encoder.0.weight"], Holder(parts))["encoder.0.weight"] is parts["encoder"][0].weight
    with pytest.raises(KeyError, match="has no parameter"):
        resolve(["0.weight", "7.weight"], parts)


def test_recorded_names_are_found_deeper_and_less_deep() -> None:
    model = _model()
    held = Holder(Holder(model))
    names = list(named_parameters(model))
    assert resolve(names, held)["2.weight"] is model[2].weight
    deep = list(named_parameters(held))
    assert deep[0] == "model.model.0.weight"
    assert resolve(deep, model)[deep[2]] is model[2].weight
    with pytest.raises(KeyError, match=r"Sequential has no parameter 'head.weight'.*made for another model"):
        resolve([*names, "head.weight"], model)
