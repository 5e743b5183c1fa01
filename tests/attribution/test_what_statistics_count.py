"""Which uses of a weight a statistic is of: experts, tied weights, products of weights, tokens that count."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from lrp_prune.relevance.unscored import UnscoredWeightsWarning
from tests.support.likelihood import how_likely
from tests.support.small_models import CAUSAL, batch_for, build, llama
from tests.support.written_statistics import expected_statistic, tokens_of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side"), list(itertools.product(["llama", "gpt2", "opt", "qwen2"], ["left", "right"]))
)
def test_padding_changes_nothing(name: str, side: str) -> None:
    model = build(name)
    short, long = batch_for(name, 1, 5)["input_ids"], batch_for(name, 1, 9)["input_ids"]
    pad = (4, 0) if side == "left" else (0, 4)
    ids = torch.cat([torch.nn.functional.pad(short, pad, value=1), long])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(short), pad), torch.ones_like(long)])
    for method in ("attnlrp", "gradient"):
        options: dict[str, Any] = {"composite": method, "statistic": "abs_token", "matmul_dtype": None}
        padded = lrp_prune.attribute(model, [{"input_ids": ids, "attention_mask": mask}], **options)
        plain = lrp_prune.attribute(model, [{"input_ids": short}, {"input_ids": long}], **options)
        for weight in plain:
            torch.testing.assert_close(padded[weight], plain[weight], rtol=1e-3, atol=1e-5 * float(plain[weight].max()))
    from lrp_prune.pruning import scorer

    padded_norms, plain_norms = scorer("wanda", model), scorer("wanda", model)
    padded_norms.update({"input_ids": ids, "attention_mask": mask})
    for part in (short, long):
        plain_norms.update({"input_ids": part})
    one, two = padded_norms.compute(), plain_norms.compute()
    for weight in one:
        torch.testing.assert_close(one[weight], two[weight], rtol=1e-4, atol=1e-6)


def test_positions_labelled_minus_100_are_not_explained() -> None:
    model, ids = build("llama"), batch_for("llama", 1, 8)["input_ids"]
    labels = ids.clone()
    labels[:, 5:] = -100
    options: dict[str, Any] = {"statistic": "abs_token", "matmul_dtype": None}
    cut = lrp_prune.attribute(model, [{"input_ids": ids[:, :5]}], **options)
    masked = lrp_prune.attribute(model, [{"input_ids": ids, "labels": labels}], **options)
    for name in cut:
        torch.testing.assert_close(cut[name], masked[name], rtol=1e-4, atol=1e-8)


def test_tied_weights_are_one_parameter_with_the_relevance_of_all_uses() -> None:
    shared = nn.Linear(4, 4, bias=False)
    tied = nn.Sequential(shared, nn.Tanh(), shared)
    apart = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    for layer in (apart[0], apart[2]):
        layer.weight.data.copy_(shared.weight.data)
    x, target = torch.randn(3, 4), lambda model, batch: model(batch).sum()
    options: dict[str, Any] = {"target": target, "statistic": "abs_token", "matmul_dtype": None}
    one = lrp_prune.attribute(tied, [x], **options)
    two = lrp_prune.attribute(apart, [x], **options)
    assert list(one) == ["0.weight"]
    torch.testing.assert_close(one["0.weight"], two["0.weight"] + two["2.weight"])


def test_a_tied_output_embedding_is_left_out_unless_included() -> None:
    model, batch = (
        llama(num_hidden_layers=1, vocab_size=50, tie_word_embeddings=True, num_key_value_heads=2).eval(),
        batch_for("llama"),
    )
    assert all("embed" not in name and "lm_head" not in name for name in lrp_prune.attribute(model, [batch]))
    included = lrp_prune.attribute(
        model, [batch], include=["model.embed_tokens"], composite="gradient", statistic="signed", matmul_dtype=None
    )
    logits = model(**batch, use_cache=False).logits
    value = how_likely(logits[:, :-1], batch["input_ids"][:, 1:])
    weight = model.model.embed_tokens.weight
    (gradient,) = torch.autograd.grad(value, weight)
    torch.testing.assert_close(
        included["model.embed_tokens.weight"] * 2, (weight * gradient).detach(), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("composite", ["attnlrp", "cp_lrp"])
def test_experts_are_scored_in_their_stack(composite: str) -> None:
    model, batch = build("mixtral"), batch_for("mixtral", 3, 9)
    relevance = lrp_prune.attribute(model, [batch], composite=composite)
    stacked = {name: tensor for name, tensor in relevance.items() if tensor.dim() == 3}
    assert stacked and all(tensor.shape[0] == 4 for tensor in stacked.values())
    assert all((tensor.flatten(1).sum(1) > 0).sum() >= 2 for tensor in stacked.values())


def test_expert_relevance_equals_the_gradient_times_the_weight() -> None:
    model, batch = build("mixtral"), batch_for("mixtral", 3, 9)
    relevance = lrp_prune.attribute(model, [batch], composite="gradient", statistic="signed", matmul_dtype=None)
    logits = model(**batch, use_cache=False).logits
    value = how_likely(logits[:, :-1], batch["input_ids"][:, 1:])
    for name, parameter in model.named_parameters():
        if name in relevance:
            (gradient,) = torch.autograd.grad(value, parameter, retain_graph=True)
            torch.testing.assert_close(relevance[name] * 3, (parameter * gradient).detach(), rtol=1e-3, atol=1e-6)


def test_queries_and_keys_are_unscored_under_cp_lrp_not_irrelevant() -> None:
    model, batch = build("llama"), batch_for("llama")
    relevance = lrp_prune.attribute(model, [batch], composite="cp_lrp")
    assert {name.split(".")[-2] for name in relevance.unscored} == {"q_proj", "k_proj", "gate_proj"}
    assert not any("q_proj" in name for name in relevance)
    with pytest.warns(UnscoredWeightsWarning, match=r"self_attn\.q_proj"):
        masks = lrp_prune.select(relevance, 0.25, scope="global")
    assert masks.num_pruned == round(0.25 * masks.num_entries)
    assert all(masks.pruned_in(name) == 0 for name in relevance.unscored)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_block_weight_of_every_architecture_is_scored(name: str) -> None:
    model = build(name)
    relevance = lrp_prune.attribute(model, [batch_for(name, 3, 9)])
    expected = {
        n
        for n, p in model.named_parameters()
        if p.dim() >= 2 and not any(part in n for part in ("embed", "wte", "wpe", "lm_head"))
    }
    assert set(relevance) == expected and not relevance.unscored


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_first_tokens_can_be_left_out_of_the_statistics(name: str) -> None:
    model, batch = build(name).double(), batch_for(name)
    relevance = lrp_prune.attribute(model, [batch], composite="gradient", statistic="squared_token", skip_first=1)
    for weight_name, (weight, a, d) in tokens_of(model, batch).items():
        value = (expected_statistic("squared_token", weight, a[:, 1:], d[:, 1:]) / 2).sqrt()
        torch.testing.assert_close(
            relevance[weight_name].double(), value.T if name == "gpt2" else value, rtol=1e-5, atol=1e-9
        )
    with pytest.raises(ValueError, match="skip_first must be 0 or more, got -1"):
        lrp_prune.attribute(model, [batch], skip_first=-1)


def test_weights_that_are_multiplied_with_each_other_are_used_by_what_comes_of_them() -> None:
    """A contraction of constants alone is no layer, however many they are."""

    class Factored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            weight = torch.einsum("ij,jk,kl->il", self.a, self.b, self.c) + self.a @ self.b
            return self.layer(x @ weight)

    torch.manual_seed(0)
    relevance = lrp_prune.attribute(
        Factored(), [(torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 0]))], include=["*weight"]
    )
    assert list(relevance) == ["layer.weight"]


@pytest.mark.parametrize("read", [lambda w: w.T, lambda w: w.mT, lambda w: w.t()], ids=["T", "mT", "t"])
def test_a_parameter_that_the_model_does_not_know_is_a_constant_however_it_is_read(
    read: Callable[[Tensor], Tensor],
) -> None:
    hidden = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))

    class Hides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.apart, self.layer = [hidden], nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) @ read(self.apart[0])

    torch.manual_seed(0)
    model, x = Hides(), torch.randn(3, 4)
    with lrp_prune.attributing(model) as propagation:
        found = propagation.relevance(model(x).sum())["x"]
    inputs = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((F.linear(inputs, model.layer.weight, model.layer.bias) @ hidden.T).sum(), inputs)
    torch.testing.assert_close(found, x * gradient)
