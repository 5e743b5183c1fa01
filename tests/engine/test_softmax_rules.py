"""z+ for softmax, against its terms written out, and the presets for vision transformers that have it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Composite
from lrp_prune.attribution import COMPOSITES, Gamma, SoftmaxZPlus, Where
from tests.support.small_models import Single

EXACT = {"rtol": 1e-10, "atol": 1e-12}


class Pattern(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        masked = torch.zeros(2, 5, 4, dtype=torch.bool)
        masked[0, 2, 1] = True
        return torch.softmax(input.masked_fill(masked, -math.inf), self.dim)


@pytest.mark.parametrize("dim", [-1, 1])
def test_scores_share_relevance_by_their_positive_terms(dim: int) -> None:
    torch.manual_seed(0)
    x, c = torch.randn(2, 5, 4).double(), torch.randn(2, 5, 4).double()
    model, s = Pattern(dim), Pattern(dim)(x)
    with lrp_prune.attributing(model, Composite("z", {"softmax": SoftmaxZPlus()})) as propagation:
        value = (model(x) * c).sum()
        found = propagation.relevance(value)["input"]
    rows = x.movedim(dim, -1).reshape(-1, x.shape[dim])
    patterns, relevances = (entry.movedim(dim, -1).reshape(rows.shape) for entry in (s, s * c))
    expected, conserved = torch.zeros_like(rows), 0.0
    for row, pattern, relevance, result in zip(rows, patterns, relevances, expected, strict=True):
        jacobian = torch.diag(pattern) - torch.outer(pattern, pattern)  # [j, i]
        terms = (jacobian * row).clamp(min=0)
        conserved += float(relevance[terms.sum(1) > 0].sum())
        result += (terms / terms.sum(1, keepdim=True).clamp(min=1e-300) * relevance[:, None]).sum(0)
    moved = expected.view(x.movedim(dim, -1).shape).movedim(-1, dim)
    torch.testing.assert_close(found, moved, **EXACT)
    assert abs(float(found.sum()) - conserved) < 1e-10


class Attending(nn.Module):
    """One layer of attention, by one function or written out."""

    def __init__(self, fused: bool, causal: bool, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused, self.causal, self.groups = fused, causal, groups
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8 // groups), nn.Linear(8, 8 // groups)
        self.out = nn.Linear(8, 8)

    def forward(self, input: Tensor) -> Tensor:
        query, key, value = (
            layer(input).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        if self.fused:
            made = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, enable_gqa=self.groups > 1)
        else:
            key, value = (entry.repeat_interleave(self.groups, 1) for entry in (key, value))
            scores = query @ key.transpose(-1, -2) / math.sqrt(2)
            if self.causal:
                scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf)
            made = torch.softmax(scores, -1) @ value
        return self.out(made.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("causal", "groups"), [(False, 1), (True, 1), (True, 2)])
def test_fused_attention_has_the_relevance_of_attention_that_is_written_out(causal: bool, groups: int) -> None:
    x = torch.randn(2, 5, 8).double()
    found = {}
    for fused in (True, False):
        model = Attending(fused, causal, groups).double()
        with lrp_prune.attributing(model, "attnlrp_gamma_z_plus") as propagation:
            output = model(x)
            assert torch.equal(output, model(x)) and output.requires_grad
            found[fused] = propagation.relevance(output.square().sum())["input"]
    torch.testing.assert_close(found[True], found[False], **EXACT)
    assert float(found[True].abs().max()) > 1e-3


class Masked(nn.Module):
    """Attention with a mask, a scale and dropout, by one function or written out."""

    def __init__(self, fused: bool, mask: Tensor) -> None:
        super().__init__()
        self.fused, self.mask = fused, mask

    def forward(self, input: Tensor) -> Tensor:
        query, key, value = input.unbind(1)
        if self.fused:
            return F.scaled_dot_product_attention(query, key, value, self.mask, dropout_p=0.5, scale=0.7)
        scores = query @ key.mT * 0.7
        masked = self.mask.dtype == torch.bool
        scores = scores.masked_fill(~self.mask, -math.inf) if masked else scores + self.mask
        return torch.softmax(scores, -1).nan_to_num(0.0) @ value


@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_fused_attention_has_its_mask_and_scale_and_no_dropout(kind: str) -> None:
    torch.manual_seed(0)
    mask = torch.rand(5, 5) > 0.3 if kind == "boolean" else torch.randn(5, 5).double()
    if kind == "boolean":
        mask[2] = False  # attends to nothing
    x, found = torch.randn(2, 3, 5, 4).double(), {}
    for fused in (True, False):
        found[fused] = relevance(Masked(fused, mask), x, "attnlrp_gamma_z_plus")
    torch.testing.assert_close(found[True], found[False], **EXACT)
    assert float(found[True].abs().max()) > 1e-3


@pytest.mark.parametrize("preset", ["attnlrp_gamma", "cp_lrp_gamma", "attnlrp_gamma_z_plus"])
def test_a_preset_has_its_gammas_and_its_softmax(preset: str) -> None:
    composite = COMPOSITES[preset]
    assert composite.rule("convolution") == Gamma(0.25) and composite.rule("linear") == Gamma(0.05)
    model, x = Attending(False, False).double(), torch.randn(2, 5, 8).double()
    others = [name for name in ("attnlrp", "attnlrp_gamma", "cp_lrp_gamma", "attnlrp_gamma_z_plus") if name != preset]
    found = relevance(model, x, preset)
    assert not any(torch.allclose(found, relevance(model, x, other), rtol=1e-3) for other in others)
    projections = Composite("vit", {Where("linear", name="out"): "gradient"}, base=preset)
    assert not torch.allclose(found, relevance(model, x, projections), rtol=1e-3)


def relevance(model: nn.Module, x: Tensor, composite: Any) -> Tensor:
    with lrp_prune.attributing(model, composite) as propagation:
        return propagation.relevance(model(x).square().sum())["input"]


@pytest.mark.parametrize("composite", ["attnlrp", "gradient"])
@pytest.mark.parametrize("dim", [-1, 0])
def test_rows_that_are_masked_as_a_whole_hand_nothing_on(composite: str, dim: int) -> None:
    """Their softmax is not a number, and so is its gradient, also where the model puts zeros in its place."""
    scores, values = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    hidden = torch.tensor([False, True, False])[:, None]

    mask = torch.zeros(3, 1, dtype=torch.float64).masked_fill(hidden, -torch.inf)

    def attention(x: Tensor) -> Tensor:
        return along(x + mask).masked_fill(hidden, 0.0) @ values

    def without(x: Tensor) -> Tensor:
        return along(x).masked_fill(hidden, 0.0) @ values

    def along(rows: Tensor) -> Tensor:
        return torch.softmax(rows.movedim(-1, dim), dim).movedim(dim, -1)

    found = []
    for function in (attention, without):
        with lrp_prune.attributing(model := Single(function), composite) as propagation:
            found.append(propagation.relevance(model(scores).sum())["x"])
    assert bool(found[0].any()) and not bool(found[0][1].any())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("given", [lambda x: x.sum(), lambda x: x[:, :0]], ids=["one number", "none"])
def test_a_softmax_of_one_number_or_none_has_no_masked_rows(given: Callable[[Tensor], Tensor]) -> None:
    with lrp_prune.attributing(model := Single(lambda x: torch.softmax(given(x), -1)), "attnlrp") as propagation:
        assert not bool(propagation.relevance(model(torch.ones(2, 3)).sum())["x"].any())


def test_a_value_that_such_a_row_is_a_part_of_is_none() -> None:
    with (
        lrp_prune.attributing(model := Single(lambda x: torch.softmax(x * -torch.inf, -1)), "attnlrp") as propagation,
        pytest.raises(FloatingPointError, match="the explained value is nan"),
    ):
        propagation.relevance(model(torch.ones(2, 3)).sum())
