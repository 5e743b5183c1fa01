"""Parts of weights that rules or tokens never reach are told of: they would be pruned first."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import lrp_prune
from lrp_prune.attribution.silent import in_blocks, silent_outputs
from lrp_prune.relevance.unscored import UnscoredWeightsWarning
from tests.support.small_models import batch_for, build


def _told(name: str, composite: str, samples: int = 4, tokens: int = 9) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lrp_prune.attribute(build(name), [batch_for(name, samples, tokens)], composite=composite)
    return [str(entry.message) for entry in caught if issubclass(entry.category, UnscoredWeightsWarning)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", "128 of 192 outputs of transformer.h.*.attn.c_attn.weight: what 'cp_lrp' stops"),
        (
            "phi3",
            "192 of 320 outputs of model.layers.*.self_attn.qkv_proj.weight, model.layers.*.mlp.gate_up_proj.weight",
        ),
        ("bloom", "attention.query_key_value.weight"),
    ],
)
def test_queries_keys_and_gates_within_a_weight_are_told_of(name: str, expected: str) -> None:
    (message,) = _told(name, "cp_lrp")
    assert expected in message and "exclude=[" in message
    assert _told(name, "attnlrp") == _told(name, "epsilon") == []


@pytest.mark.parametrize("name", ["llama", "opt", "mistral"])
def test_weights_that_are_reached_or_unscored_as_a_whole_need_no_word(name: str) -> None:
    assert _told(name, "cp_lrp") == []


def test_dead_units_are_irrelevant_and_no_part_of_a_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        relevance = lrp_prune.attribute(
            model, [torch.randn(1, 8)], composite="cp_lrp", target=lambda model, x: model(x).sum()
        )
    assert int((~relevance["0.weight"].any(dim=1)).sum()) > 16  # with one sample many units are off


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lrp", "wanda"])
def test_experts_of_a_stack_that_no_token_goes_to_are_told_of(method: str) -> None:
    model, batch = build("mixtral"), batch_for("mixtral", 1, 2)
    with pytest.warns(UnscoredWeightsWarning, match=r"of 16 experts of model\.layers\.\*\.mlp\.experts.*more samples"):
        lrp_prune.prune(model, [batch], sparsity=0.2, method=method)
    many: dict[str, Any] = {"input_ids": torch.randint(3, 50, (8, 32))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lrp_prune.prune(build("mixtral"), [many], sparsity=0.2, method=method)


def test_what_is_a_block_and_what_is_an_output() -> None:
    values = torch.zeros(16, 3)
    values[8:] = 1.0
    for layout, given in (("linear", values), ("transposed", values.T), ("convolution", values[..., None])):
        silent = silent_outputs(given, layout)
        assert silent.shape == (1, 16) and silent[0, :8].all() and not silent[0, 8:].any() and in_blocks(silent)
    assert silent_outputs(values[None].transpose(1, 2), "stacked_transposed").shape == (1, 16)
    scattered = torch.arange(16)[None] % 2 == 0
    assert not in_blocks(scattered) and not in_blocks(torch.zeros(1, 16, dtype=torch.bool))
