"""AttnLRP against its rules written out from the paper's formulas (arXiv 2402.05602), without the engine's code, in float64.

In the gradient form, explaining ``sum(c * y)`` starts from the relevance ``R = c * y`` of each output.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from tests.support.small_models import llama


def engine(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], composite: str = "attnlrp"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Relevance that the engine gives for outputs seeded with c; also the output's relevance to start from."""

    class Model(nn.Module):
        def forward(self, **kwargs: Tensor) -> Tensor:
            return function(**kwargs)

    model = Model()
    with lrp_prune.attributing(model, composite=composite) as propagation:
        y = model(**inputs)
        c = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
        relevance = propagation.relevance((c * y).sum())
    return (c * y).detach(), relevance


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def cube(x: Tensor) -> Tensor:
    return x**3


def linear_rule(x: Tensor, weight: Tensor, bias: Tensor | None, relevance: Tensor) -> Tensor:
    """Eq. 8 with epsilon -> 0: R_i = sum_j W_ji x_i R_j / z_j; the bias is part of z and absorbs its share."""
    z = x @ weight.T + (0 if bias is None else bias)
    return torch.einsum("ji,...i,...j->...i", weight, x, relevance / z)


def product_rule(relevance: Tensor) -> Tensor:
    """Eq. 14: each factor of a product gets half."""
    return relevance / 2


def softmax_rule(x: Tensor, relevance: Tensor) -> Tensor:
    """Eq. 13: R_i = x_i (R_i - s_i sum_j R_j)."""
    return x * (relevance - torch.softmax(x, -1) * relevance.sum(-1, keepdim=True))


def matmul_rule(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 15: R_a[j,i] = sum_p a[j,i] b[i,p] R[j,p] / (2 o[j,p]), and likewise for b."""
    share = relevance / (2 * (a @ b))
    return torch.einsum("...ji,...ip,...jp->...ji", a, b, share), torch.einsum("...ji,...ip,...jp->...ip", a, b, share)


def layer_norm_rule(x: Tensor, weight: Tensor, bias: Tensor, eps: float, relevance: Tensor) -> Tensor:
    """Eq. 19: the deviation is a constant; centering and scaling are one linear map with the rule of eq. 8."""
    n = x.shape[-1]
    deviation = (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    centering = torch.eye(n, dtype=x.dtype) - 1 / n
    y = (x - x.mean(-1, keepdim=True)) / deviation * weight + bias
    return x * (((relevance / y) * weight / deviation) @ centering)


def test_linear_with_and_without_bias() -> None:
    x, weight, bias = random(3, 5), random(4, 5), random(4)
    for b in (None, bias):
        start, relevance = engine(lambda x, b=b: torch.nn.functional.linear(x, weight, b), {"x": x})
        torch.testing.assert_close(relevance["x"], linear_rule(x, weight, b, start))


def test_convolution_is_a_linear_layer_over_patches() -> None:
    x, weight = random(1, 2, 5, 5), random(3, 2, 3, 3)
    start, relevance = engine(lambda x: torch.nn.functional.conv2d(x, weight), {"x": x})
    patches = torch.nn.functional.unfold(x, 3)[0].T
    by_patch = linear_rule(patches, weight.flatten(1), None, start[0].flatten(1).T)
    expected = torch.nn.functional.fold(by_patch.T[None], (5, 5), 3)
    torch.testing.assert_close(relevance["x"], expected)


@pytest.mark.parametrize(
    "activation",
    [cube, torch.square, torch.relu, torch.nn.functional.silu, torch.nn.functional.gelu, torch.tanh, torch.sigmoid],
)
def test_activations_hand_relevance_on(activation: Callable[[Tensor], Tensor]) -> None:
    start, relevance = engine(lambda x: activation(x), {"x": random(4, 6)})
    torch.testing.assert_close(relevance["x"], start)


def test_gated_product() -> None:
    start, relevance = engine(
        lambda gate, up: torch.nn.functional.silu(gate) * up, {"gate": random(4, 6), "up": random(4, 6)}
    )
    torch.testing.assert_close(relevance["gate"], product_rule(start))
    torch.testing.assert_close(relevance["up"], product_rule(start))


def test_gated_product_under_cp_lrp_goes_to_the_gated_side() -> None:
    gate = {"gate": random(4, 6), "up": random(4, 6)}
    start, relevance = engine(lambda gate, up: torch.nn.functional.silu(gate) * up, gate, "cp_lrp")
    torch.testing.assert_close(relevance["up"], start)
    assert not relevance["gate"].any()


def test_softmax() -> None:
    x = random(4, 6)
    start, relevance = engine(lambda x: torch.softmax(x, -1), {"x": x})
    torch.testing.assert_close(relevance["x"], softmax_rule(x, start))


def test_product_of_matrices() -> None:
    a, b = random(2, 4, 3), random(2, 3, 5)
    start, relevance = engine(lambda a, b: a @ b, {"a": a, "b": b})
    for name, expected in zip("ab", matmul_rule(a, b, start), strict=True):
        torch.testing.assert_close(relevance[name], expected)


def attention_rule(q: Tensor, k: Tensor, v: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5
    scores = q @ k.transpose(-1, -2)
    pattern = torch.softmax(scores * scale, -1)
    to_pattern, to_v = matmul_rule(pattern, v, relevance)
    to_scores = softmax_rule(scores * scale, to_pattern)  # scaling by a constant hands relevance on
    to_q, to_k = matmul_rule(q, k.transpose(-1, -2), to_scores)
    return to_q, to_k.transpose(-1, -2), to_v


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v


@pytest.mark.parametrize("attention", [torch.nn.functional.scaled_dot_product_attention, eager_attention])
def test_attention(attention: Callable[..., Tensor]) -> None:
    q, k, v = random(2, 3, 5, 4), random(2, 3, 5, 4), random(2, 3, 5, 4)
    start, relevance = engine(lambda q, k, v: attention(q, k, v), {"q": q, "k": k, "v": v})
    for name, expected in zip("qkv", attention_rule(q, k, v, start), strict=True):
        torch.testing.assert_close(relevance[name], expected)


def test_layer_norm() -> None:
    x, weight, bias = random(4, 6), random(6), random(6)
    start, relevance = engine(lambda x: torch.nn.functional.layer_norm(x, (6,), weight, bias, 1e-5), {"x": x})
    torch.testing.assert_close(relevance["x"], layer_norm_rule(x, weight, bias, 1e-5, start))


def test_group_norm_is_a_layer_norm_of_groups() -> None:
    x, weight = random(2, 4, 3), random(4)
    start, relevance = engine(lambda x: torch.nn.functional.group_norm(x, 2, weight, None, 1e-5), {"x": x})
    rows, scale = x.reshape(2, 2, 6), weight.repeat_interleave(3).reshape(1, 2, 6)
    expected = layer_norm_rule(rows, scale, torch.zeros(6, dtype=x.dtype), 1e-5, start.reshape(2, 2, 6))
    torch.testing.assert_close(relevance["x"], expected.reshape(x.shape))


@pytest.mark.parametrize("own", [False, True])
def test_rms_norm_hands_relevance_on(own: bool) -> None:
    weight = random(6)

    def norm(x: Tensor) -> Tensor:
        if own:  # as transformers writes it
            return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return torch.nn.functional.rms_norm(x, (6,), weight, 1e-6)

    start, relevance = engine(norm, {"x": random(4, 6)})
    torch.testing.assert_close(relevance["x"], start)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_whole_llama_layer(attention: str) -> None:
    """One decoder layer and the head of a Hugging Face Llama, rule by rule from the logit to the embeddings."""
    model = (
        llama(num_hidden_layers=1, num_key_value_heads=2, vocab_size=30, attn_implementation=attention).double().eval()
    )
    ids = torch.randint(30, (1, 6))
    with lrp_prune.attributing(model, unruled="error") as propagation:
        logits = model(input_ids=ids, use_cache=False).logits
        relevance = propagation.relevance(logits[0, -1, 7])["model.embed_tokens"]

    layer = model.model.layers[0]
    with torch.no_grad():
        record: dict[str, Any] = {}
        x = model.model.embed_tokens(ids)
        normed = layer.input_layernorm(x)
        heads = {
            name: getattr(layer.self_attn, f"{name}_proj")(normed).view(1, 6, 2, 8).transpose(1, 2)
            for name in ("q", "k", "v")
        }
        cos, sin = model.model.rotary_emb(x, torch.arange(6)[None])
        rotation = {name: _rotation_matrices(cos[0], sin[0]) for name in ("q", "k")}
        rotated = {name: torch.einsum("tij,bhtj->bhti", rotation[name], heads[name]) for name in ("q", "k")}
        scores = rotated["q"] @ rotated["k"].transpose(-1, -2) * 8**-0.5
        causal = torch.ones(6, 6, dtype=torch.bool).tril()
        pattern = torch.softmax(scores.masked_fill(~causal, float("-inf")), -1)
        mixed = pattern @ heads["v"]
        attended = layer.self_attn.o_proj(mixed.transpose(1, 2).reshape(1, 6, 16))
        middle = x + attended
        normed_middle = layer.post_attention_layernorm(middle)
        gate, up = layer.mlp.gate_proj(normed_middle), layer.mlp.up_proj(normed_middle)
        hidden = torch.nn.functional.silu(gate) * up
        written = layer.mlp.down_proj(hidden)
        last = middle + written
        final = model.model.norm(last)
        torch.testing.assert_close(model.lm_head(final), logits.detach())

        start = torch.zeros(1, 6, 30, dtype=torch.float64)
        start[0, -1, 7] = logits[0, -1, 7].detach()
        r_last = linear_rule(final, model.lm_head.weight, None, start)
        r_written, r_middle = r_last * written / last, r_last * middle / last
        r_hidden = linear_rule(hidden, layer.mlp.down_proj.weight, None, r_written)
        r_middle = r_middle + linear_rule(normed_middle, layer.mlp.gate_proj.weight, None, product_rule(r_hidden))
        r_middle = r_middle + linear_rule(normed_middle, layer.mlp.up_proj.weight, None, product_rule(r_hidden))
        r_attended, r_x = r_middle * attended / middle, r_middle * x / middle
        r_mixed = linear_rule(mixed.transpose(1, 2).reshape(1, 6, 16), layer.self_attn.o_proj.weight, None, r_attended)
        r_mixed = r_mixed.view(1, 6, 2, 8).transpose(1, 2)
        r_pattern, r_v = matmul_rule(pattern, heads["v"], r_mixed)
        r_scores = _masked_softmax_rule(scores, pattern, r_pattern)
        r_q, r_k = matmul_rule(rotated["q"], rotated["k"].transpose(-1, -2), r_scores)
        record["q"] = _rotated_back(rotation["q"], heads["q"], rotated["q"], r_q)
        record["k"] = _rotated_back(rotation["k"], heads["k"], rotated["k"], r_k.transpose(-1, -2))
        record["v"] = r_v
        for name, head_relevance in record.items():
            flat = head_relevance.transpose(1, 2).reshape(1, 6, 16)
            r_x = r_x + linear_rule(normed, getattr(layer.self_attn, f"{name}_proj").weight, None, flat)
    # transformers computes norms and rotations in float32
    torch.testing.assert_close(relevance, r_x, rtol=1e-5, atol=1e-8)


def _masked_softmax_rule(scores: Tensor, pattern: Tensor, relevance: Tensor) -> Tensor:
    return scores * (relevance - pattern * relevance.sum(-1, keepdim=True))


def _rotation_matrices(cos: Tensor, sin: Tensor) -> Tensor:
    """x -> x cos + rotate_half(x) sin as one matrix per position."""
    n = cos.shape[-1]
    half = torch.zeros(n, n, dtype=cos.dtype)
    half[: n // 2, n // 2 :] = -torch.eye(n // 2, dtype=cos.dtype)
    half[n // 2 :, : n // 2] = torch.eye(n // 2, dtype=cos.dtype)
    return torch.diag_embed(cos) + sin[..., None] * half


def _rotated_back(rotation: Tensor, x: Tensor, y: Tensor, relevance: Tensor) -> Tensor:
    """Eq. 8 for the rotation of each position."""
    return torch.einsum("tij,bhtj,bhti->bhtj", rotation, x, relevance / y)
