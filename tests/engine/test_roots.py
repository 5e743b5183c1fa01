"""Which parameters and constants are data follows from their use: what enters as data is a root, so that nothing is missing."""

import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from tests.support.small_models import POSITIONS, batch_for, build, forward

TOKENS = 3


class Joined(nn.Module):
    """Patches, what is done to them with a parameter, and a linear head without a bias."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)
        self.token = nn.Parameter(torch.randn(*shape))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.use(self.patch(x), self.token)).sum(1)
        return result


def _set(hidden: Tensor, token: Tensor) -> Tensor:
    hidden[:, 0] = token
    return hidden


def _set_masked(hidden: Tensor, token: Tensor) -> Tensor:
    mask = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    mask[:, 1] = True
    hidden[mask] = token
    return hidden


def _copied(hidden: Tensor, token: Tensor) -> Tensor:
    hidden[:, 0].copy_(token)
    return hidden


def _filled(hidden: Tensor, token: Tensor) -> Tensor:
    """The usual way to make room for a class token: zeros, into which both are written."""
    whole = torch.zeros(len(hidden), hidden.shape[1] + 1, 4)
    whole[:, 0] = token
    whole[:, 1:] = hidden
    return whole


def _written_into_nothing(hidden: Tensor, token: Tensor) -> Tensor:
    """Memory without values, of which all that is read is written by what is copied into its parts."""
    whole = hidden.new_empty(len(hidden), hidden.shape[1] + 1, 4)
    whole.fill_(7.0)  # whatever was there
    whole[:, :1].copy_(token)
    whole[:, 1:].copy_(hidden)
    return whole


def _masked_scatter(hidden: Tensor, token: Tensor) -> Tensor:
    mask = torch.zeros(hidden.shape, dtype=torch.bool)
    mask[:, 0] = True
    return hidden.masked_scatter(mask, token.expand(len(hidden), -1).contiguous())


INDEX = torch.tensor([0])
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "concatenated": lambda h, t: torch.cat([t.expand(len(h), 1, -1), h], 1),
    "concatenated by name": lambda h, t: torch.cat(tensors=[t.expand(len(h), 1, -1), h], dim=1),
    "scaled, concatenated": lambda h, t: torch.cat([(t * 0.5).expand(len(h), 1, -1), h], 1),
    "normalised, concatenated": lambda h, t: torch.cat([nn.functional.layer_norm(t, (4,)).expand(len(h), 1, -1), h], 1),
    "stacked": lambda h, t: torch.stack([t.expand(len(h), -1), h[:, 0]], 1),
    "where": lambda h, t: torch.where(torch.arange(TOKENS)[:, None] == 1, t, h),
    "where, a method": lambda h, t: h.where(torch.arange(TOKENS)[:, None] == 1, t),
    "set": _set,
    "set by a mask": _set_masked,
    "copied": _copied,
    "written into zeros": _filled,
    "written into nothing": _written_into_nothing,
    "masked_scatter": _masked_scatter,
    "index_put": lambda h, t: h.index_put((torch.arange(len(h)), torch.zeros(len(h), dtype=torch.long)), t),
    "index_copy": lambda h, t: h.index_copy(1, INDEX, t.expand(len(h), 1, -1)),
    "scatter": lambda h, t: h.scatter(1, torch.zeros(len(h), 1, 4, dtype=torch.long), t.expand(len(h), 1, -1)),
    "slice_scatter": lambda h, t: torch.slice_scatter(h, t.expand(len(h), 1, -1), 1, 0, 1),
    "select_scatter": lambda h, t: torch.select_scatter(h, t.expand(len(h), -1), 1, 0),
    "maximum": lambda h, t: torch.maximum(h, t),
    "clamp": lambda h, t: torch.clamp(h, min=t),
}
ADDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added": lambda h, t: h + t,
    "added by name": lambda h, t: torch.add(h, other=t),
    "added in place": lambda h, t: h.add_(t),
    "added to": lambda h, t: t.expand_as(h).clone().add_(h),
    "subtracted": lambda h, t: t - h,
    "index_add": lambda h, t: h.index_add(1, INDEX, t.expand(len(h), TOKENS, -1)[:, :1]),
    "baddbmm": lambda h, t: torch.baddbmm(t.expand(len(h), TOKENS, -1), h, torch.eye(4).expand(len(h), 4, 4)),
    "distance": lambda h, t: torch.cdist(h, t.reshape(-1, 4)).sum(-1, keepdim=True).expand(-1, -1, 4),
}


def _explained(model: nn.Module, composite: str = "cp_lrp") -> tuple[float, dict[str, Tensor]]:
    x = torch.randn(2, TOKENS, 4, generator=torch.Generator().manual_seed(1))
    plain = model(x)
    with lrp_prune.attributing(model, composite, unruled="error") as propagation:
        output = model(x)
        assert torch.equal(output, plain)
        value = output[:, 0].sum()
        relevance = propagation.relevance(value)
    return value.item(), relevance


@pytest.mark.parametrize("use", JOINS)
def test_a_parameter_that_is_joined_with_activations_is_data(use: str) -> None:
    """However many dimensions it has."""
    for shape in ((4,), (1, 4)) if use not in ("set by a mask",) else ((4,),):
        value, relevance = _explained(Joined(JOINS[use], *shape))
        assert set(relevance) == {"x", "token"}
        assert sum(float(tensor.sum()) for tensor in relevance.values()) == pytest.approx(value, rel=1e-5)
        assert relevance["token"].abs().sum() > 0.01


@pytest.mark.parametrize("use", ADDED)
def test_what_is_added_is_data_if_it_has_two_dimensions_and_a_bias_if_it_has_one(use: str) -> None:
    value, relevance = _explained(Joined(ADDED[use], TOKENS, 4))
    assert set(relevance) == {"x", "token"}
    assert sum(float(tensor.sum()) for tensor in relevance.values()) == pytest.approx(value, rel=1e-5)
    value, relevance = _explained(Joined(ADDED[use], 4))
    assert set(relevance) == {"x"}
    assert abs(float(relevance["x"].sum()) - value) > 1e-3 * abs(value)


def test_a_bias_that_is_put_together_of_parts_is_none_the_less_a_bias() -> None:
    def projected(hidden: Tensor, token: Tensor) -> Tensor:
        return nn.functional.linear(hidden, torch.eye(4), torch.cat([token[:2], torch.zeros(2)]))

    assert set(_explained(Joined(projected, 4))[1]) == {"x"}


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
    value, relevance = _explained(Constant(function))
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
    assert set(_explained(Constant(NO_DATA[use]))[1]) == {"x"}


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
    value, relevance = _explained(model, composite)
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
        assert set(_explained(Constant(lambda m, h: h + 0.5), composite)[1]) == {"x"}
    for composite in ("attnlrp", "cp_lrp", "gradient"):
        assert set(_explained(Constant(normalised), composite)[1]) == {"x"}


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

    value, relevance = _explained(Constant(written))
    assert set(relevance) == {"x"} and float(relevance["x"].sum()) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("name", POSITIONS)
def test_cp_lrp_conserves_with_positions_and_class_tokens_of_any_kind(name: str) -> None:
    model, batch = build(name, biases=False), batch_for(name)
    with lrp_prune.attributing(model, "cp_lrp", unruled="error") as propagation:
        value = forward(model, batch).amax(-1).sum()
        relevance = propagation.relevance(value)
    value = value.detach()
    total, absolute = (
        sum(float(change(tensor.double()).sum()) for tensor in relevance.values())
        for change in (torch.clone, torch.abs)
    )
    assert abs(total - float(value)) < 1e-5 * absolute
    expected = {
        "marian": {"model.encoder.embed_positions.constant", "model.decoder.embed_positions.constant"},
        "pegasus": {"model.encoder.embed_positions.constant", "model.decoder.embed_positions.constant"},
        "xglm": {"model.embed_positions.constant"},
        "ctrl": {"transformer.constant"},
        "clip_vision": {"embeddings.class_embedding", "embeddings.position_embedding"},
        "bart": {"model.encoder.embed_positions", "model.decoder.embed_positions"},
    }[name]
    assert expected < set(relevance)
    assert all(float(relevance[root].abs().sum()) > 1e-3 * absolute for root in expected)


def test_an_embedding_that_is_shared_is_named_after_who_calls_it() -> None:
    for name, prefix in (("t5", ""), ("bart", "model."), ("marian", "model.")):
        model, batch = build(name), batch_for(name)
        batch["decoder_input_ids"] = batch["decoder_input_ids"][:, :4]
        with lrp_prune.attributing(model) as propagation:
            relevance = propagation.relevance(forward(model, batch).amax(-1).sum())
        assert relevance[f"{prefix}encoder.embed_tokens"].shape == (2, 7, 32)
        assert relevance[f"{prefix}decoder.embed_tokens"].shape == (2, 4, 32)
    model, batch = build("llama"), batch_for("llama")
    with lrp_prune.attributing(model) as propagation:
        assert set(propagation.relevance(forward(model, batch).amax(-1).sum())) == {"model.embed_tokens"}


def test_a_module_that_several_hold_is_named_by_the_one_that_calls_it() -> None:
    class Reader(nn.Module):
        def __init__(self, table: nn.Embedding) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"table": table})

        def forward(self, ids: Tensor) -> Tensor:
            result: Tensor = self.inner["table"](ids)
            return result

    class Readers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Embedding(5, 4)
            self.left, self.right = Reader(self.shared), Reader(self.shared)

        def forward(self, ids: Tensor) -> Tensor:
            result: Tensor = self.left(ids[:, :1]) + self.right(ids) + self.shared(ids)
            return result

    model, ids = Readers(), torch.tensor([[1, 2, 3]])
    with lrp_prune.attributing(model) as propagation:
        relevance = propagation.relevance(model(ids).sum())
    assert {name: tensor.shape[1] for name, tensor in relevance.items()} == {
        "left.inner.table": 1,
        "right.inner.table": 3,
        "shared": 3,
    }


def test_an_embedding_that_is_called_twice_by_the_same_module_is_counted() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 1, bias=False)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.head(self.table(first) + 2 * self.table(second))

    model, first, second = Twice(), torch.tensor([1]), torch.tensor([2])
    with lrp_prune.attributing(model) as propagation:
        relevance = propagation.relevance(model(first, second).sum())
    weight = model.head.weight[0]
    torch.testing.assert_close(relevance["table"][0], (model.table.weight[1] * weight).detach())
    torch.testing.assert_close(relevance["table#1"][0], (2 * model.table.weight[2] * weight).detach())


def test_a_bag_of_embeddings_is_a_root() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(5, 4, mode="mean"), nn.Linear(4, 1, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.bag(ids))

    model = Bag()
    with lrp_prune.attributing(model) as propagation:
        value = model(torch.tensor([[0, 2], [3, 4]])).sum()
        relevance = propagation.relevance(value)
    assert set(relevance) == {"bag"} and relevance["bag"].shape == (2, 4)
    torch.testing.assert_close(relevance["bag"].sum(), value)


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
