"""Scans and linear attention: a state decays by exponentials, which are constants; in steps or in chunks, they conserve."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba2 import modeling_mamba2 as mamba
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

import lrp_prune

TOKENS = 6


class Called(nn.Module):
    """A function of several activations as a model."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, **tensors: Tensor) -> Tensor:
        return self.function(**tensors)


def _explained(function: Callable[..., Tensor], composite: str, **tensors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The explained value, which is the last token's sum, and relevance; the forward is what it was."""
    model = Called(function)
    with lrp_prune.attributing(model, composite, unruled="error") as propagation:
        output = model(**tensors)
        assert torch.equal(output, function(**tensors))
        value = output[:, -1].sum()
        return value.detach(), propagation.relevance(value)


def _decays(g: Tensor) -> Tensor:
    return torch.exp(-nn.functional.softplus(g))


def _by_steps(x: Tensor, g: Tensor) -> Tensor:
    state, states = torch.zeros_like(x[:, 0]), []
    for token in range(x.shape[1]):
        state = state * _decays(g[:, token]) + x[:, token]
        states.append(state)
    return torch.stack(states, 1)


def _in_place(x: Tensor, g: Tensor) -> Tensor:
    state, states = torch.zeros_like(x[:, 0]), []
    for token in range(x.shape[1]):
        state = state * (-nn.functional.softplus(g[:, token])).exp_() + x[:, token]
        states.append(state)
    return torch.stack(states, 1)


def _by_a_matrix(x: Tensor, g: Tensor) -> Tensor:
    """All steps at once: ``exp(c_i - c_j)``, of which the diagonal is one, and makes no relevance get lost."""
    total = -nn.functional.softplus(g).cumsum(1)
    pairs = (total[:, :, None] - total[:, None]).masked_fill(
        torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)[:, :, None], float("-inf")
    )
    return torch.einsum("bijd,bjd->bid", pairs.exp(), x)


def _in_chunks(x: Tensor, g: Tensor) -> Tensor:
    """Decays within a chunk multiply those of the chunks before."""
    half = TOKENS // 2
    first = _by_steps(x[:, :half], g[:, :half])
    within = torch.exp(-nn.functional.softplus(g[:, half:]).cumsum(1))
    return torch.cat(
        [first, _by_steps(x[:, half:], g[:, half:]) + first[:, -1:] * within * torch.exp(0 * g[:, half:])], 1
    )


@pytest.mark.parametrize("composite", ["attnlrp", "cp_lrp"])
@pytest.mark.parametrize("scan", [_by_steps, _in_place, _by_a_matrix, _in_chunks])
def test_a_state_keeps_what_its_decays_have_left_of_it(scan: Callable[..., Tensor], composite: str) -> None:
    """Of each token what is left of it at the end, and nothing of what tells how fast it decays."""
    x, g = torch.randn(2, TOKENS, 4), torch.randn(2, TOKENS, 4)
    value, relevance = _explained(scan, composite, x=x, g=g)
    left = torch.stack([_decays(g[:, token + 1 :]).prod(1) for token in range(TOKENS)], 1)
    torch.testing.assert_close(relevance["x"], left * x)
    assert not relevance["g"].any()
    torch.testing.assert_close(relevance["x"].sum(), value)


def test_an_exponential_is_a_feature_like_any_other_where_it_scales_nothing() -> None:
    x = torch.randn(2, TOKENS, 4)
    value, relevance = _explained(lambda x: torch.exp(x), "attnlrp", x=x)
    torch.testing.assert_close(relevance["x"][:, -1], x[:, -1].exp())
    torch.testing.assert_close(relevance["x"].sum(), value)


def _delta_rule(module: Any, name: str) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        arguments = {"g": -nn.functional.softplus(g), "beta": torch.sigmoid(beta)}
        states = {"initial_state": None, "output_final_state": False}
        result: Tensor = getattr(module, name)(q, k, v, **arguments, **states, use_qk_l2norm_in_kernel=True)[0]
        return result

    return function


def _mamba(x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
    result: Tensor = mamba.mamba2_chunk_scan(
        x, dt, -torch.ones(2), b, c, chunk_size=4, dt_softplus=True, D=torch.ones(2)
    )
    return result


RULES: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "in chunks": (_delta_rule(qwen, "torch_chunk_gated_delta_rule"), False),
    "by steps": (_delta_rule(qwen, "torch_recurrent_gated_delta_rule"), False),
    "in chunks, each key by itself": (_delta_rule(kimi, "chunk_kimi_delta_attention"), True),
    "by steps, each key by itself": (_delta_rule(kimi, "recurrent_kimi_delta_attention"), True),
}
"""Functions, and whether each of a head's keys decays by itself."""


@pytest.mark.parametrize("composite", ["attnlrp", "cp_lrp"])
@pytest.mark.parametrize("name", RULES)
def test_the_gated_delta_rule_conserves(name: str, composite: str) -> None:
    function, by_key = RULES[name]
    tensors = {key: torch.randn(2, TOKENS, 2, 4) for key in "qkvg"} | {"beta": torch.randn(2, TOKENS, 2)}
    if not by_key:
        tensors["g"] = tensors["g"][..., 0]
    value, relevance = _explained(function, composite, **tensors)
    torch.testing.assert_close(sum(tensor.sum() for tensor in relevance.values()), value, rtol=1e-4, atol=1e-4)
    assert float(relevance["v"].abs().sum()) > 0.01 and not relevance["g"].any()


@pytest.mark.parametrize("composite", ["attnlrp", "cp_lrp"])
def test_a_state_space_in_chunks_conserves(composite: str) -> None:
    tensors = {"x": torch.randn(2, TOKENS, 2, 4), "dt": torch.randn(2, TOKENS, 2)}
    tensors |= {key: torch.randn(2, TOKENS, 1, 4) for key in "bc"}
    value, relevance = _explained(_mamba, composite, **tensors)
    torch.testing.assert_close(sum(tensor.sum() for tensor in relevance.values()), value, rtol=1e-4, atol=1e-4)
