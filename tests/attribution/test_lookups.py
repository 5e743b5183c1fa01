"""Which lookups of a model are of its tokens: the relevance of others is no token's."""

import torch
from torch import Tensor, nn

import lrp_prune
from tests.support.small_models import build, forward


class Copying(nn.Module):
    """Reads a copy of its ids, and learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(16, 4), nn.Embedding(16, 4), nn.Linear(4, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1])[None].expand_as(input_ids)
        return self.head(self.words(input_ids.clone()) + self.places(places.contiguous())).mean(1)


def test_positions_are_no_tokens_that_happen_to_have_their_numbers() -> None:
    model, batch = build("gpt2"), {"input_ids": torch.arange(8)[None]}
    found = lrp_prune.explain(model, batch)
    assert "transformer.wpe" in "".join(found.elsewhere)
    with lrp_prune.attributing(model) as propagation:
        relevance = propagation.relevance(forward(model, batch).amax(-1).sum())["transformer.wte"].sum(-1)
    torch.testing.assert_close(found.inputs["input_ids"].relevance, relevance.detach())


def test_ids_that_a_model_copies_are_found_by_their_values() -> None:
    torch.manual_seed(0)
    found = lrp_prune.explain(Copying(), {"input_ids": torch.tensor([[3, 1, 4, 1, 5]])})
    assert set(found.inputs) == {"input_ids"} and any("places" in name for name in found.elsewhere)


class Hashed(nn.Module):
    """Looks tokens up twice, the second time by a copy of their ids."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.others, self.head = nn.Embedding(16, 4), nn.Embedding(16, 4), nn.Linear(4, 3, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.words(input_ids) + self.others(torch.where(input_ids < 16, input_ids, 0))).mean(1)


def test_a_copy_of_the_tokens_is_of_them_as_well() -> None:
    torch.manual_seed(0)
    found = lrp_prune.explain(Hashed(), {"input_ids": torch.tensor([[3, 1, 4, 1, 5]])})
    assert not found.elsewhere
    torch.testing.assert_close(found.inputs["input_ids"].relevance.sum(1), found.values)
