"""Small batches laid together: fewer runs, and the same."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.pruning import scorer
from lrp_prune.pruning.compensation import compensate_, together
from lrp_prune.pruning.compensation.together import laid_in_few
from tests.support.compensation import EXACT
from tests.support.small_models import build


def both_ways(
    model: nn.Module, batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[nn.Module], list[int]]:
    """The model compensated with batches laid together, and as they are; and how often it was run."""
    masks = lrp_prune.select(scorer("random", model).compute(), 0.5, scope="layer")
    found, runs = [], []
    for entries in (together.ENTRIES, 0):
        monkeypatch.setattr(together, "ENTRIES", entries)
        mine, called = copy.deepcopy(model), list[int]()
        counting = mine.register_forward_pre_hook(lambda *_, called=called: called.append(1))
        result = compensate_(mine, masks, batches, EXACT)
        counting.remove()
        runs.append(len(called))
        assert result.samples == sum(len(batch["input_ids"]) for batch in batches)
        found.append(mine)
    return found, runs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padded_batches_of_several_lengths_come_to_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    batches = []
    for index in range(6):
        ids = torch.randint(2, 50, (2, 9 + index // 3))
        batches.append(
            {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < 7 + index % 2).expand_as(ids).long()}
        )
    (laid, apart), _ = both_ways(build(name).double(), batches, monkeypatch)
    for (entry, ours), theirs in zip(laid.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9, msg=entry)


@pytest.mark.slow
def test_many_small_batches_cost_a_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(2, 50, (1, 12))} for _ in range(12)]
    _, (laid, apart) = both_ways(build("llama"), batches, monkeypatch)
    assert laid < apart / 6


def outputs(model: nn.Module) -> Any:
    return lambda batch: [model(batch).detach()]


class Contrasting(nn.Module):
    """Samples of a batch see each other."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x.flatten(1)
        return (x @ x.T).softmax(-1) @ x


class TimeFirst(nn.Module):
    """What looks like samples are steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)[0]
        return result


class Long(nn.Module):
    """One value for all samples, which is no sum and no mean of theirs."""

    def forward(self, x: Tensor) -> Tensor:
        return x.norm()


@pytest.mark.parametrize("kind", [Contrasting, TimeFirst, Long, lambda: nn.BatchNorm1d(3).train()])
def test_batches_whose_samples_are_not_alone_stay_as_they_are(kind: Any) -> None:
    torch.manual_seed(0)
    shape = (4, 5, 3) if kind is TimeFirst else (4, 3)
    batches = [torch.randn(shape) for _ in range(4)]
    assert laid_in_few(batches, 60, outputs(kind())) is batches
    (laid,) = laid_in_few(batches, 60, outputs(nn.Linear(3, 3)))
    assert torch.equal(laid, torch.cat(batches))


class Shifted(nn.Module):
    """Gives beside its samples what is the same for any number of them, as a bias of positions."""

    def __init__(self, counted: float) -> None:
        super().__init__()
        self.counted = counted

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((1, 3), 1 + self.counted * len(x))


@pytest.mark.parametrize("counted", [0.0, 1.0])
def test_what_is_the_same_for_any_number_of_samples_may_be_beside_them(counted: float) -> None:
    batches = [torch.randn(1, 3) for _ in range(4)]
    layer, shift = nn.Linear(3, 3), Shifted(counted)
    laid = laid_in_few(batches, 60, lambda batch: [layer(batch).detach(), shift(batch)])
    assert len(laid) == (4 if counted else 1)
    assert laid_in_few(batches, 60, lambda batch: [shift(batch)]) is batches, "no output has a sample's own values"


@pytest.mark.slow
def test_it_is_the_last_stage_that_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are not computed to see whether batches may be laid together, nor does it count that samples meet in them."""
    torch.manual_seed(0)
    model = build("llama")
    model.lm_head = Contrasting()
    batches = [{"input_ids": torch.randint(2, 50, (1, 12))} for _ in range(12)]
    (mine, _), (laid, apart) = both_ways(model, batches, monkeypatch)
    assert laid < apart / 6
    assert mine.lm_head.calls == 1, "the first run, which finds the stages"


def test_large_batches_and_those_that_do_not_fit_stay_as_they_are() -> None:
    model = nn.Linear(3, 3)
    batches = [torch.randn(4, 3) for _ in range(5)]
    assert laid_in_few(batches, together.ENTRIES // 2 + 1, outputs(model)) is batches
    assert [len(batch) for batch in laid_in_few(batches, together.ENTRIES // 2, outputs(model))] == [8, 8, 4]
    other = [torch.randn(4, 3), torch.randn(4, 2, 3)]
    assert laid_in_few(other, 12, outputs(model)) is other
