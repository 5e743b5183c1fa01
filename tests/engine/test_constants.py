"""Constants that enter as data, numbers too where rules conserve, are roots of their own; masks and zeros are none."""

import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from tests.support.explained import TOKENS, explained_tokens
from tests.support.small_models import batch_for, build, forward


def _sines() -> Tensor:
    return torch.sin(torch.arange(TOKENS * 4.0).reshape(TOKENS, 4))


class Constant(nn.Module):
    """A model that adds or joins a constant of its own."""

    def __init__(self, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Module()
        self.inner.register_buffer("table", torch.cat([_sines(), _sines()]))
        self.patch, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)
        self.positions = Positions()
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.use(self, self.patch(x))).sum(1)
        return result


class Positions(nn.Module):
    def forward(self, tokens: int) -> Tensor:
        with torch.no_grad():
            return _sines()[:tokens]


CONSTANTS: dict[str, tuple[str, Callable[[nn.Module, Tensor], Tensor]]] = {
    "a part of a buffer": ("inner.table", lambda m, h: h + m.inner.table[: h.shape[1]]),
    "looked up in a buffer": (
        "inner.table",
        lambda m, h: h + nn.functional.embedding(torch.arange(TOKENS), m.inner.table),
    ),
    "made by the model": ("model.constant", lambda m, h: h + _sines()),
    "returned by a module": ("positions.constant", lambda m, h: h + m.positions(TOKENS)),
    "concatenated": ("model.constant", lambda m, h: torch.cat([h, torch.ones(len(h), 1, 4)], 1)),
    "of an activation": ("model.detached", lambda m, h: h + h.detach()),
}


@pytest.mark.parametrize("use", CONSTANTS)
def test_constants_that_enter_as_data_are_roots_of_their_own(use: str) -> None:
    name, function = CONSTANTS[use]
    value, relevance = explained_tokens(Constant(function))
    assert set(relevance) == {"x", name}
    assert sum(float(tensor.sum()) for tensor in relevance.values()) == pytest.approx(value, rel=1e-5)


NO_DATA: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "zeros": lambda m, h: h + torch.zeros(TOKENS, 4),
    "truth values": lambda m, h: h.masked_fill(torch.ones(TOKENS, 4, dtype=torch.bool).triu(3), 1.0),
    "a mask of infinities": lambda m, h: (h + torch.full((TOKENS, 4), -math.inf).triu(1)).clamp(min=-1),
    "numbers and a mask of infinities": lambda m, h: (
        h + (_sines() + torch.full((TOKENS, 4), -math.inf).triu(1))
    ).clamp(min=-1),
    "a mask of large numbers": lambda m, h: (h + torch.full((TOKENS, 4), -1e4).triu(1)).clamp(min=-1),
    "a mask of the largest numbers": lambda m, h: (h + torch.full((TOKENS, 4), torch.finfo().min).triu(1)).clamp(
        min=-1
    ),
}


@pytest.mark.parametrize("use", NO_DATA)
def test_masks_are_no_data(use: str) -> None:
    assert set(explained_tokens(Constant(NO_DATA[use]))[1]) == {"x"}


def _set_in_place(hidden: Tensor) -> Tensor:
    hidden += 2
    return hidden


NUMBERS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "added": (lambda h: h + 0.5, lambda h: torch.full_like(h, 0.5)),
    "added to": (lambda h: 3 + h, lambda h: torch.full_like(h, 3.0)),
    "added several times": (lambda h: torch.add(h, 2, alpha=0.25), lambda h: torch.full_like(h, 0.5)),
    "added in place": (_set_in_place, lambda h: torch.full_like(h, 2.0)),
    "subtracted": (lambda h: h - 0.5, lambda h: torch.full_like(h, -0.5)),
    "subtracted from": (lambda h: 1 - h, lambda h: torch.ones_like(h)),
    "subtracted from, in parts": (lambda h: torch.rsub(h, 1, alpha=2), lambda h: torch.ones_like(h)),
    "a tensor": (lambda h: h + torch.tensor(0.5), lambda h: torch.full_like(h, 0.5)),
    "a tensor of another type": (lambda h: h + torch.tensor(2), lambda h: torch.full_like(h, 2.0)),
    "truth values": (lambda h: h + (torch.arange(4) > 1), lambda h: (torch.arange(4) > 1).expand_as(h).to(h.dtype)),
    "one number for each channel": (lambda h: h + _sines()[0][None, None], lambda h: _sines()[0].expand_as(h)),
    "of a gate at zero": (lambda h: torch.sigmoid(h * 0), lambda h: torch.full_like(h, 0.5)),
    "of an exponential at zero": (lambda h: torch.exp(h - h), torch.ones_like),
    "of a cosine at zero": (lambda h: torch.cos(h.masked_fill(_UPPER, 0.0)), lambda h: _UPPER.to(h.dtype).expand_as(h)),
    "of a bound that is met at zero": (lambda h: (h * 0).clamp(min=0.25), lambda h: torch.full_like(h, 0.25)),
}
_UPPER = torch.ones(TOKENS, 4, dtype=torch.bool).triu(1)
"""What is done to activations, and the part of the result that is a constant's."""


@pytest.mark.parametrize("composite", ["cp_lrp", "attnlrp"])
@pytest.mark.parametrize("use", NUMBERS)
def test_numbers_that_absorb_are_roots_of_their_own(use: str, composite: str) -> None:
    function, constant = NUMBERS[use]
    model = Constant(lambda m, h: function(h))
    value, relevance = explained_tokens(model, composite)
    assert set(relevance) == {"x", "model.constant"}
    x = torch.randn(2, TOKENS, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.head(constant(model.patch(x))).sum(1)[:, 0].sum()
    assert float(relevance["model.constant"].sum()) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    assert float(relevance["x"].sum()) == pytest.approx(value - float(expected), rel=1e-4, abs=1e-5)


def test_numbers_are_no_roots_where_the_plain_gradient_is_taken_nor_where_a_statistic_is_kept_from_zero() -> None:
    def normalised(model: nn.Module, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-3)

    for composite in ("gradient", "epsilon"):
        assert set(explained_tokens(Constant(lambda m, h: h + 0.5), composite)[1]) == {"x"}
    for composite in ("attnlrp", "cp_lrp", "gradient"):
        assert set(explained_tokens(Constant(normalised), composite)[1]) == {"x"}


def test_constants_are_let_go_after_the_forward() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def added(model: nn.Module, hidden: Tensor) -> Tensor:
        constant = torch.zeros(TOKENS, 4)
        seen.append(weakref.ref(constant))
        return hidden + constant

    model = Constant(added)
    with lrp_prune.attributing(model):
        model(torch.ones(2, TOKENS, 4))
        assert [reference() for reference in seen] == [None]


def test_what_is_never_read_of_a_constant_may_be_anything() -> None:
    """A buffer is made without values, and all that is read of it is written."""

    def written(model: nn.Module, hidden: Tensor) -> Tensor:
        buffer = torch.full((len(hidden), TOKENS, 4), math.nan)
        buffer[:] = hidden
        return buffer

    value, relevance = explained_tokens(Constant(written))
    assert set(relevance) == {"x"} and float(relevance["x"].sum()) == pytest.approx(value, rel=1e-5)


def test_constants_that_are_added_to_attention_scores_are_named_where_the_rules_propagate_through_them() -> None:
    """Relevance of a sum is the sum of its parts', so what positions took from the scores is seen under AttnLRP."""
    model, batch = build("bloom", biases=False), batch_for("bloom")
    with lrp_prune.attributing(model, "attnlrp") as propagation:
        relevance = propagation.relevance(forward(model, batch).amax(-1).sum())
    assert {f"transformer.h.{layer}.self_attention.constant" for layer in (0, 1)} < set(relevance)
    with lrp_prune.attributing(model, "cp_lrp") as propagation:
        value = forward(model, batch).amax(-1).sum()
        relevance = propagation.relevance(value)
    assert set(relevance) == {"transformer.word_embeddings"}


def test_collecting_leaves_constants_alone() -> None:
    """Only who asks for the relevance of inputs needs them."""
    model, seen = build("xglm"), []
    original = torch.Tensor.requires_grad_

    def noted(tensor: Tensor, *args: bool) -> Tensor:
        seen.append(tuple(tensor.shape))
        return original(tensor, *args)

    torch.Tensor.requires_grad_ = noted
    try:
        lrp_prune.attribute(model, [batch_for("xglm")])
    finally:
        torch.Tensor.requires_grad_ = original
    assert seen.count((2, 7, 32)) == 1
