"""Weights that are used where relevance is not followed are told by that, not as if they were not used at all."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

import lrp_prune
from lrp_prune.relevance.unscored import DATA, NO_PRODUCT, TRANSFORMED, UNUSED, WITHOUT_GRADIENTS

X, CLASSES = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class Beside(nn.Module):
    """What a function makes of a weight, beside a layer that is followed."""

    def __init__(self, made: Callable[["Beside", Tensor], Tensor]) -> None:
        super().__init__()
        self._made = made
        self.other, self.layer, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.layer(x) + self._made(self, x)).relu())


def off(run: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return run()


def twice(weight: Tensor, x: Tensor) -> Tensor:
    """A use in which a layer is none, run without gradients and, recomputed, with them."""
    return checkpoint(lambda y: y * weight.exp().mean(), x.mean(-1, keepdim=True), use_reentrant=True)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda m, x: vmap(m.other)(x), TRANSFORMED),
        (lambda m, x: vmap(lambda row: m.other.weight @ row)(x), TRANSFORMED),
        (lambda m, x: vmap(lambda row: F.linear(row, m.other.weight))(x).detach(), TRANSFORMED),
        (lambda m, x: off(lambda: m.other(x)), WITHOUT_GRADIENTS),
        (lambda m, x: off(lambda: x @ m.other.weight.T), WITHOUT_GRADIENTS),
        (lambda m, x: off(lambda: m.other(x)) + twice(m.other.weight, x), WITHOUT_GRADIENTS),
        (lambda m, x: twice(m.other.weight, x), NO_PRODUCT),
        (lambda m, x: x.new_zeros(1), UNUSED),
        (lambda m, x: off(lambda: x.new_zeros(m.other.weight.dtype.itemsize + 2)), UNUSED),
        (lambda m, x: m.other.weight.mean(1), DATA),
    ],
)
def test_why_a_weight_has_no_relevance(made: Callable[[Beside, Tensor], Tensor], reason: str) -> None:
    torch.manual_seed(0)
    relevance = lrp_prune.attribute(Beside(made), [(X, CLASSES)])
    assert relevance.unscored == {"other.weight": reason} and set(relevance) == {"layer.weight", "head.weight"}


def test_a_table_of_which_sums_are_looked_up_is_data() -> None:
    model = nn.Sequential(nn.EmbeddingBag(10, 6), nn.Linear(6, 3))
    relevance = lrp_prune.attribute(model, [(torch.arange(32).view(8, 4) % 10, CLASSES)], include=["*"])
    assert relevance.unscored == {"0.weight": DATA} and "sum of its rows" in DATA


def test_a_model_inside_of_which_everything_is_transformed_is_told_so() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    outer = nn.Module()
    outer.inner, outer.forward = model, lambda x: vmap(model)(x)  # type: ignore[method-assign]
    with pytest.raises(
        ValueError, match=r"linear in inner\.0 \(Linear\).* inside a transformation of torch\.func, such as vmap"
    ):
        lrp_prune.attribute(outer, [(X, CLASSES)])


def test_layers_of_times_that_are_integers_are_told_the_way_out() -> None:
    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time, self.last = nn.Linear(4, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.last(x * self.time(t[:, None].float() * torch.ones(4, device=t.device)).sin())

    batch = {"x": torch.randn(8, 6), "t": torch.arange(8), "labels": torch.randn(8, 6)}
    found = lrp_prune.attribute(Timed(), [batch])
    assert (
        list(found.unscored) == ["time.weight"] and "unless they are given as floats" in found.unscored["time.weight"]
    )
    assert not lrp_prune.attribute(Timed(), [{**batch, "t": batch["t"].float()}]).unscored
