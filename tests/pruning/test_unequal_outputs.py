"""Recalibration of models whose outputs have shapes that depend on values: there is nothing to compare, or a part of it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lrp_prune
from lrp_prune.pruning.recalibration import IncomparableError, recalibrate


class Detector(nn.Module):
    """Boxes of those places alone whose score is positive, and, if asked for, a value for each sample; or lists of boxes."""

    def __init__(self, pooled: bool = False, listed: bool = False) -> None:
        super().__init__()
        self.body, self.scored, self.boxes = nn.Linear(12, 32), nn.Linear(32, 1), nn.Linear(32, 4)
        self.refined, self.last = nn.Linear(4, 4), nn.Linear(32, 3) if pooled else None
        self.listed = listed

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x).relu()
        found = hidden[self.scored(hidden)[:, 0] > 0]
        boxes = self.refined(self.boxes(found).relu())  # another number of rows once pruned: a layer without pairs
        if self.listed:
            return [{"box": box} for box in boxes]  # more or fewer outputs
        return {"boxes": boxes, "kinds": self.last(hidden)} if self.last is not None else boxes


def target(model: nn.Module, batch: Any) -> Tensor:
    found = model(batch)
    return sum(entry.sum() for entry in tree_leaves(found))


METHOD = lrp_prune.Wanda()


@pytest.fixture
def batches() -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(40, 12) for _ in range(4)]


@pytest.mark.parametrize("listed", [False, True])
def test_it_is_pruned_without_and_told_so(
    listed: bool, batches: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model = Detector(listed=listed)
    other, asked = copy.deepcopy(model), copy.deepcopy(model)
    with caplog.at_level("INFO", "lrp_prune"):
        masks = lrp_prune.prune(model, batches, 0.7, METHOD)
    (told,) = [record.message for record in caplog.records if "not recalibrated" in record.message]
    assert "shapes or the number of outputs depend on values: pass recalibrate=False" in told
    assert masks == lrp_prune.prune(other, batches, 0.7, METHOD, recalibrate=False, rounds=2)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    before = copy.deepcopy(asked.state_dict())
    with pytest.raises(IncomparableError, match="nothing that the dense model gives can be compared"):
        lrp_prune.prune(asked, batches, 0.7, METHOD, recalibrate=True)
    assert all(torch.equal(value, before[name]) for name, value in asked.state_dict().items())


def test_outputs_that_can_be_compared_decide(batches: list[Tensor], caplog: pytest.LogCaptureFixture) -> None:
    model = Detector(pooled=True)
    alone = copy.deepcopy(model)
    masks = lrp_prune.select(lrp_prune.pruning.scorer("magnitude", model).compute(), 0.7, scope="layer")
    with caplog.at_level("INFO", "lrp_prune"):
        found = recalibrate(model, masks, batches, "")
    assert any("does not compare output 1 of 2" in record.message for record in caplog.records)
    assert found.left_out.keys() == {"boxes.weight", "refined.weight"}  # no pairs of rows
    assert set(found.left_out.values()) == {
        "gives outputs of another shape once masks are applied, as shapes depend on values"
    }
    alone.forward = lambda x: {"kinds": alone.last(alone.body(x).relu())}
    assert found.divergences == pytest.approx(recalibrate(alone, masks, batches, "").divergences)
    assert found.strength > 0


def test_a_target_that_is_a_function_can_be_compared(batches: list[Tensor]) -> None:
    model = Detector()
    before = model.body.weight.detach().clone()
    method = lrp_prune.LRP(target=target)
    masks = lrp_prune.prune(model, batches, 0.5, method, recalibrate=True)
    kept = masks["body.weight"]
    assert torch.isfinite(model.body.weight).all() and not model.body.weight[~kept].any()
    assert before[kept].abs().sum() > 0


class Pair:
    """What a model returns of a class of its own."""

    __slots__ = ("kinds", "values")

    def __init__(self, kinds: Tensor, values: Tensor) -> None:
        self.kinds, self.values = kinds, values


class Paired(nn.Module):
    """Two values, as an object or a tuple."""

    def __init__(self, returned: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.kinds, self.values, self.returned = (
            nn.Linear(12, 32),
            nn.Linear(32, 3),
            nn.Linear(32, 2),
            returned,
        )

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x).relu()
        return self.returned(self.kinds(hidden), self.values(hidden))


def test_outputs_in_an_object_are_compared_as_those_in_a_tuple(batches: list[Tensor]) -> None:
    method = lrp_prune.Wanda().with_target(lambda model, batch: model(batch))
    found = []
    for returned in (Pair, lambda *outputs: outputs):
        masks = lrp_prune.prune(model := Paired(returned), batches, 0.5, method)
        found.append((masks, model.state_dict()))
    (masks, state), (others, other) = found
    assert masks == others and all(torch.equal(value, other[name]) for name, value in state.items())
