"""Reference batches are laid together only where the model gives the same for them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.pruning.laying import gives_the_same


class OfEight(nn.Module):
    """Takes batches of eight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("state", torch.zeros(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x + self.state)))


class TimeFirst(nn.Module):
    """``[time, samples, channels]``: one batch behind the other would be one longer sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "plain": (plain, (8, 16), True),
    "of eight": (OfEight, (8, 16), False),
    "time first": (TimeFirst, (6, 8, 16), False),
    "no samples": (plain, (16,), False),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"compensation": "exact"}], ids=str)
def test_models_that_want_their_batches_as_they_are_get_them(
    name: str, options: dict[str, Any], monkeypatch: Any
) -> None:
    make, shape, together = MODELS[name]
    torch.manual_seed(0)
    model, batches = make().eval(), [torch.randn(shape) for _ in range(24)]
    sizes = set[tuple[int, ...]]()
    model.register_forward_pre_hook(lambda _, given: sizes.add(tuple(given[0].shape)))
    alone = copy.deepcopy(model)
    target = lrp_prune.LRP(target=lambda module, x: module(x).sum())
    lrp_prune.prune(model, batches, 0.5, target, **options)
    assert ((len(sizes) > 2) or (max(sizes)[0] > 2 * shape[0])) == together
    monkeypatch.setattr("lrp_prune.pruning.fitting.ENTRIES", 0)
    monkeypatch.setattr("lrp_prune.pruning.compensation.together.ENTRIES", 0)
    lrp_prune.prune(alone, batches, 0.5, target, **options)
    if not together:
        assert all(
            torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True)
        )


@pytest.mark.parametrize(
    ("number", "expected"),
    [(lambda x: x.sum(), True), (lambda x: x.sum() / len(x), True), (lambda x: x.square().sum().sqrt(), False)],
    ids=["sum", "mean", "norm"],
)
def test_numbers_are_sums_or_means_of_samples(number: Callable[[Tensor], Tensor], expected: bool) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(3, 4), torch.randn(5, 4)
    assert gives_the_same(torch.cat([first, second]), first, second, lambda batch: [number(batch)]) == expected


def by_time(batch: Tensor) -> list[Tensor]:
    """Rows of all samples, one step after the other, as they are packed."""
    return [batch.transpose(0, 1).flatten(0, 1)]


def test_rows_may_come_in_another_order_and_not_be_others() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(3, 4, 2), torch.randn(5, 4, 2)
    both = torch.cat([first, second])
    assert gives_the_same(both, first, second, by_time)
    assert not gives_the_same(both, first, second, lambda batch: [by_time(batch)[0].cumsum(0)])


def test_rows_that_add_up_to_nothing_are_compared_one_by_one() -> None:
    half = torch.randn(4, 3)
    batch = torch.cat([half, -half])

    def outputs(given: Tensor) -> list[Tensor]:
        return [given * (1 + 1e-6 * torch.rand(given.shape))]

    assert gives_the_same(torch.cat([batch, batch]), batch, batch, outputs)


def test_memory_that_is_not_enough_is_no_answer() -> None:
    def outputs(batch: Tensor) -> list[Tensor]:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no more")
        return [batch]

    with pytest.raises(torch.OutOfMemoryError):
        gives_the_same(torch.ones(4), torch.ones(2), torch.ones(2), outputs)
