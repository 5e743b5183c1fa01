"""What a forward writes into a model, outside of buffers as well, comes out of a pass as it went in."""

from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn

import lrp_prune
from lrp_prune.models.states import unchanged_state


class Counting(nn.Module):
    """Counts its calls in four ways, and answers by one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.calls, self.last, self.seen = 0, "", False
        self.register_buffer("total", torch.zeros(()))
        self.size, self.rows = torchmetrics.SumMetric(), torchmetrics.CatMetric()

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.last, self.seen = self.calls + 1, f"{self.calls}", True
        self.total += 1
        self.size.update(len(x))
        self.rows.update(x.detach().sum(1))
        return self.linear(x) + self.calls


def state(model: Counting) -> list[Any]:
    metrics = [model.size.sum_value.clone(), list(model.rows.value), model.size._update_count, model.rows._update_count]
    return [model.calls, model.last, model.seen, model.total.clone(), *metrics]


def test_numbers_strings_and_metrics() -> None:
    model, x = Counting(), torch.randn(5, 4)
    model(x)
    before, held = state(model), model.total
    with unchanged_state(model):
        for _ in range(3):
            model(x)
        model.size.compute()
        assert model.calls == 4 and model.size.sum_value == 20
    after = state(model)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after, strict=True))
    assert model.total is held and model.size.compute() == 5 and model.rows.compute().shape == (5,)


def test_a_pass_of_relevance_leaves_no_trace() -> None:
    model, batches = Counting(), [(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))]
    before = str(state(model))
    first = lrp_prune.attribute(model, batches)
    assert str(state(model)) == before
    second = lrp_prune.attribute(model, batches)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_lazy_module_stays_what_it_has_become() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with unchanged_state(model):
        model(torch.randn(2, 4))
    assert model[0].in_features == 4 and type(model[0]) is nn.Linear
