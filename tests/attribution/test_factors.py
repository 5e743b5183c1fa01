"""A weight that is used upright and transposed, as in models whose factored embedding is tied to the output layer."""

import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.relevance import Relevance
from tests.support.units import without


class Factors(nn.Module):
    """Ten channels are made four by a weight, and ten again by the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.factor = nn.Linear(6, 10), nn.Linear(10, 4, bias=False)
        self.up, self.down, self.last = nn.Linear(4, 12), nn.Linear(12, 4), nn.Linear(10, 3)
        self.silent: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        code = self.factor(self.first(inputs).relu()).relu()
        hidden = self.up(code).relu()
        hidden = hidden if self.silent is None else hidden * self.silent
        return self.last((self.down(hidden) @ self.factor.weight).relu())


def found() -> tuple[Factors, Tensor, Relevance]:
    torch.manual_seed(0)
    model, inputs = Factors().double(), torch.randn(8, 6, dtype=torch.float64)
    return model, inputs, lrp_prune.attribute(model, [(inputs, torch.arange(8) % 3)], "class", granularity="neuron")


def test_what_it_makes_and_reads_in_either_way_is_one_unit() -> None:
    model, inputs, relevance = found()
    assert len(relevance["factor"]) == 1
    assert "factor.weight" in [each.parameter for each in relevance.members["factor"]]
    with without(relevance, "factor", 0, model):  # of all of it nothing is left but the last layer's bias
        assert torch.equal(model(inputs), model.last.bias.expand(8, 3))


def test_units_between_the_two_uses_are_taken_out_one_by_one() -> None:
    model, inputs, relevance = found()
    dense = model(inputs)
    assert len(relevance["down"]) == 12
    for unit in range(12):
        model.silent = 1 - nn.functional.one_hot(torch.tensor(unit), 12).double()
        ablated, model.silent = model(inputs), None
        with without(relevance, "down", unit, model):
            torch.testing.assert_close(model(inputs), ablated)
    torch.testing.assert_close(model(inputs), dense)
