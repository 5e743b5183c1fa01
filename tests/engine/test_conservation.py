"""CP-LRP conserves: relevance summed over all roots is the explained value, on every architecture without biases."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrp_prune
from tests.support.small_models import ARCHITECTURES, NO_CHOICE, batch_for, build, forward


def _imbalance(model: nn.Module, batch: dict[str, Tensor], composite: str = "cp_lrp") -> float:
    with lrp_prune.attributing(model, composite=composite, unruled="error") as propagation:
        value = forward(model, batch).amax(-1).sum()
        relevance = propagation.relevance(value)
    total = sum(tensor.double().sum() for tensor in relevance.values())
    absolute = sum(tensor.double().abs().sum() for tensor in relevance.values())
    return float((total - value.detach().double()).abs() / absolute)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cp_lrp_conserves_on_bias_free_models(name: str, attention: str) -> None:
    assert _imbalance(build(name, attention, biases=False), batch_for(name)) < 1e-5


@pytest.mark.parametrize("name", NO_CHOICE)
def test_cp_lrp_conserves_on_further_architectures(name: str) -> None:
    assert _imbalance(build(name, biases=False), batch_for(name)) < 1e-5


def test_the_plain_gradient_does_not_conserve() -> None:
    assert _imbalance(build("llama", biases=False), batch_for("llama"), "gradient") > 1e-3


def test_biases_absorb_relevance() -> None:
    assert _imbalance(build("gpt2", biases=True), batch_for("gpt2")) > 1e-3


def test_cp_lrp_conserves_through_torchs_own_transformer() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu", norm_first=True, bias=False)
    model = nn.Sequential(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(16 * 5, 3, bias=False)
    )
    x = torch.randn(2, 5, 16)
    with lrp_prune.attributing(model.eval(), composite="cp_lrp", unruled="error") as propagation:
        value = model(x).amax(-1).sum()
        relevance = propagation.relevance(value)
    assert torch.isclose(relevance["input"].sum(), value, rtol=1e-5)


def test_every_block_of_a_language_model_holds_the_whole_relevance() -> None:
    model, batch = build("llama", biases=False), batch_for("llama")
    with lrp_prune.attributing(model, composite="cp_lrp", latent=["model.layers.?"]) as propagation:
        value = forward(model, batch).amax(-1).sum()
        relevance = propagation.relevance(value)
    assert set(relevance) == {"model.embed_tokens", "model.layers.0", "model.layers.1"}
    for tensor in relevance.values():
        assert tensor.shape == (2, 7, 32)
        assert torch.isclose(tensor.sum(), value, atol=1e-5)


@pytest.mark.parametrize("composite", ["attnlrp", "cp_lrp", "gradient"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_eager_and_sdpa_attention_give_the_same_relevance(name: str, composite: str) -> None:
    results = []
    for attention in ("eager", "sdpa"):
        model, batch = build(name, attention), batch_for(name)
        with lrp_prune.attributing(model, composite=composite) as propagation:
            results.append(propagation.relevance(forward(model, batch).amax(-1).sum()))
    assert results[0].keys() == results[1].keys()
    for key in results[0]:
        torch.testing.assert_close(
            results[0][key], results[1][key], rtol=1e-3, atol=1e-5 * float(results[0][key].abs().max() + 1e-6)
        )


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_reduced_precision_agrees_with_float32(name: str, mode: str) -> None:
    model, batch = build(name), batch_for(name)

    def relevance(precise: bool) -> Tensor:
        chosen = model if precise or mode == "autocast" else build(name, dtype=torch.bfloat16)
        data = batch if precise or mode == "autocast" else batch_for(name, dtype=torch.bfloat16)
        with lrp_prune.attributing(chosen, composite="attnlrp") as propagation:
            with torch.autocast("cpu", torch.bfloat16, enabled=not precise and mode == "autocast"):
                value = forward(chosen, data)[:, 1].sum()
            return next(iter(propagation.relevance(value).values())).float().flatten()

    assert torch.cosine_similarity(relevance(True), relevance(False), dim=0) > 0.98


class _Residual(nn.Module):
    """Adds its input to an activation, in place or not."""

    def __init__(self, activation: Callable[[Tensor], Tensor], in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3, bias=False)
        self.activation, self.in_place = activation, in_place

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.activation(self.first(inputs))
        if self.in_place:
            hidden += inputs
        else:
            hidden = hidden + inputs
        result: Tensor = self.last(hidden)
        return result


@pytest.mark.parametrize("activation", [F.gelu, F.silu, F.softplus, nn.GELU(), nn.SiLU(), nn.RReLU()])
def test_models_that_add_to_an_activation_in_place(activation: Callable[[Tensor], Tensor]) -> None:
    """What comes of it is what comes of adding out of place; no random number is drawn for it either."""
    inputs, found = torch.randn(4, 8), []
    for in_place in (True, False):
        model = _Residual(activation, in_place).train()
        with lrp_prune.attributing(model, "cp_lrp") as propagation:
            value = model(inputs)[:, 0].sum()
            state = torch.get_rng_state()
            found.append(propagation.relevance(value))
        assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("composite", ["epsilon", "attnlrp", "gradient"])
@pytest.mark.parametrize("granularity", ["weight", "neuron"])
def test_models_that_add_to_the_output_of_an_observed_layer_in_place(composite: str, granularity: str) -> None:
    inputs, found = torch.randn(2, 5, 8), []
    for in_place in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), _Residual(nn.Identity(), in_place))
        relevance = lrp_prune.attribute(
            model, [inputs], lambda model, batch: model(batch)[..., 0].sum(), composite, granularity=granularity
        )
        found.append(dict(relevance.items()))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 0
    for name, values in found[0].items():
        torch.testing.assert_close(values, found[1][name])
