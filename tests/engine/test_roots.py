"""Which parameters and constants are data follows from their use: what enters as data is a root, so that nothing is missing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from tests.support.explained import TOKENS, explained_tokens
from tests.support.small_models import POSITIONS, batch_for, build, forward


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


@pytest.mark.parametrize("use", JOINS)
def test_a_parameter_that_is_joined_with_activations_is_data(use: str) -> None:
    """However many dimensions it has."""
    for shape in ((4,), (1, 4)) if use not in ("set by a mask",) else ((4,),):
        value, relevance = explained_tokens(Joined(JOINS[use], *shape))
        assert set(relevance) == {"x", "token"}
        assert sum(float(tensor.sum()) for tensor in relevance.values()) == pytest.approx(value, rel=1e-5)
        assert relevance["token"].abs().sum() > 0.01


@pytest.mark.parametrize("use", ADDED)
def test_what_is_added_is_data_if_it_has_two_dimensions_and_a_bias_if_it_has_one(use: str) -> None:
    value, relevance = explained_tokens(Joined(ADDED[use], TOKENS, 4))
    assert set(relevance) == {"x", "token"}
    assert sum(float(tensor.sum()) for tensor in relevance.values()) == pytest.approx(value, rel=1e-5)
    value, relevance = explained_tokens(Joined(ADDED[use], 4))
    assert set(relevance) == {"x"}
    assert abs(float(relevance["x"].sum()) - value) > 1e-3 * abs(value)


def test_a_bias_that_is_put_together_of_parts_is_none_the_less_a_bias() -> None:
    def projected(hidden: Tensor, token: Tensor) -> Tensor:
        return nn.functional.linear(hidden, torch.eye(4), torch.cat([token[:2], torch.zeros(2)]))

    assert set(explained_tokens(Joined(projected, 4))[1]) == {"x"}


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
