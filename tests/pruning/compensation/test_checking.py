"""Where stages read something of others beside what these give, the model is gone through as one."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.pruning import LeastSquares, Masks
from lrp_prune.pruning.choices import Choices
from lrp_prune.pruning.compensation import compensate_
from lrp_prune.pruning.compensation.checking import _alike, not_reproduced
from lrp_prune.pruning.compensation.compensated import Compensated
from lrp_prune.pruning.compensation.partial_runs import PartialRuns
from lrp_prune.pruning.compensation.stages import Watched, made_of, stages_of
from lrp_prune.pruning.pairs import PlacedUses
from lrp_prune.pruning.processes import Processes
from tests.support.compensation import EXACT, check_closed_form, half
from tests.support.small_models import batch_for, build

ALONE = Processes(None)


class State:
    """What blocks hand on, and write into."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Block(nn.Module):
    """Two layers beside a residual; what is between them stays behind as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.side = self.up(x).relu()
        return x + self.down(self.side)


class OfState(Block):
    """Writes into the state that it is given, and gives it back or nothing."""

    gives = True

    def forward(self, state: Any) -> Any:  # type: ignore[override]
        state.x = super().forward(state.x)
        return state if self.gives else None


class Nothing(OfState):
    gives = False


class Stacked(nn.Module):
    """Three blocks and a last layer."""

    def __init__(self, block: type[Block] = Block) -> None:
        super().__init__()
        self.blocks, self.last = nn.ModuleList(block() for _ in range(3)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Handed(Stacked):
    """Blocks hand on a state."""

    def forward(self, x: Tensor) -> Tensor:
        state: Any = State(x)
        for block in self.blocks:
            state = block(state) or state
        return self.last(state.x)


class Sideways(Stacked):
    """Each block also reads what the one before left behind."""

    def forward(self, x: Tensor) -> Tensor:
        beside: Any = 0.0
        for block in self.blocks:
            x = block(x + beside)
            beside = block.side.mean(1, keepdim=True)
        return self.last(x)


class Noisy(Stacked):
    """Gives something else each time."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x + 0.1 * self.calls)


class Keyed(Stacked):
    """A block looks up what the one before wrote into a dictionary; where it is not there, that is an error."""

    def forward(self, x: Tensor) -> Tensor:
        written: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks):
            x = block(x + (written[number - 1] if number else 0.0), written, number)
        return self.last(x)


class Writing(Block):
    def forward(self, x: Tensor, written: dict[int, Tensor], number: int) -> Tensor:  # type: ignore[override]
        written[number] = x.mean(1, keepdim=True)
        return super().forward(x)


class Inplace(Stacked):
    """A block writes into what it gets, which is added to what it gives."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class Clamped(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.relu_())


ODD = {
    "dictionary": lambda: Keyed(Writing),
    "in place": lambda: Inplace(Clamped),
    "state": lambda: Handed(OfState),
    "nothing given": lambda: Handed(Nothing),
    "attribute": Sideways,
}


def pruned(model: nn.Module) -> Masks:
    return half(model, [name for name, weight in model.named_parameters() if weight.dim() > 1])


def found_in(model: nn.Module, batches: list[Any], processes: Processes = ALONE) -> list[str]:
    masks = pruned(model)
    runs = PartialRuns(model, masks, batches, "", torch.device("cpu"))
    stages = stages_of(model, {name: weight for name, weight in model.named_parameters() if name in masks})
    watched = Watched(stages)
    with watched.watching():
        runs.outputs(batches[0], PlacedUses(masks), Choices())
    return not_reproduced(runs, stages, made_of([watched], stages), processes)


@pytest.mark.parametrize("name", ODD)
def test_stages_that_read_more_than_others_give_are_found(name: str) -> None:
    torch.manual_seed(0)
    assert found_in(ODD[name](), [torch.randn(32, 8) for _ in range(2)]) == ["blocks.1", "blocks.2", "last"]


@pytest.mark.parametrize("name", ["plain", "noisy", "llama", "t5", "vit", "mixtral", "gpt_oss", "bert", "qwen3_next"])
def test_others_are_not(name: str) -> None:
    torch.manual_seed(0)
    if name in ("plain", "noisy"):
        model, batches = Stacked() if name == "plain" else Noisy(), [torch.randn(32, 8) for _ in range(2)]
    else:
        model, batches = build(name), [batch_for(name, 2, 7) for _ in range(2)]
    assert not found_in(model, batches)


@pytest.mark.parametrize("name", ODD)
def test_each_layer_of_such_a_model_has_the_least_squares_of_what_it_gets(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = ODD[name]().double()
    batches = [torch.randn(48, 8).double() for _ in range(3)]
    dense, masks = copy.deepcopy(model), pruned(model)
    found = compensate_(model, masks, batches, EXACT)
    assert found.as_one == ["blocks.1", "blocks.2", "last"] and not found.left_out
    checked = check_closed_form(dense, model, masks, lambda entry: entry(torch.cat(batches)), EXACT, 1e-6)
    assert checked == set(masks)
    assert "as one and not block by block, since blocks.*, last read something of others" in str(found)
    with caplog.at_level(logging.WARNING):
        lrp_prune.prune(dense, batches, 0.5, "magnitude", compensation="exact")
    assert [record.message for record in caplog.records if "as one" in record.message] == [
        "compensated as one and not block by block, since blocks.*, last read something of others beside what these give: "
        "more memory, and more time for each layer"
    ]


def test_those_that_are_trained_stage_by_stage_leave_them_out_by_name() -> None:
    torch.manual_seed(0)
    model, batches = Sideways(), [torch.randn(48, 8) for _ in range(2)]
    masks, seen = pruned(model), list[str]()

    class Refining:
        updates = True

        def restored(self, *_: Any) -> bool:
            return False

        def refine(self, name: str, *_: Any) -> None:
            seen.append(name)

    found = compensate_(model, masks, batches, LeastSquares(), refining=Refining())
    assert seen == ["blocks.0"]
    assert set(found.left_out) == set(masks) - {"blocks.0.up.weight", "blocks.0.down.weight"}
    assert set(found.left_out.values()) == {"reads something of layers before it beside what these give"}
    for name, weight in model.named_parameters():
        if name in masks:
            assert not weight[~masks[name]].any()


def test_inputs_are_alike_where_the_same_weights_get_as_much() -> None:
    expected = [("a", 1.0), ("b", 2.0)]
    assert _alike([("a", 1.0), ("b", 2.00001)], expected)
    for other in ([("a", 1.0), ("b", 2.1)], [("a", 1.0)], [("a", 1.0), ("c", 2.0)], []):
        assert not _alike(other, expected)


def test_what_one_process_finds_all_find() -> None:
    class Pair(Processes):
        """Another process, in which the second stage is not reproduced."""

        asked = 0

        def gathered(self, value: Any) -> list[Any]:
            self.asked += 1
            return [value, self.asked != 2]

    torch.manual_seed(0)
    assert found_in(Stacked(), [torch.randn(32, 8)], Pair(None)) == ["blocks.1"]


def test_a_model_of_one_batch_and_of_plain_stages_is_told_as_before() -> None:
    torch.manual_seed(0)
    model, batches = Stacked(), [torch.randn(48, 8)]
    found = compensate_(model, pruned(model), batches, LeastSquares())
    assert found.as_one == [] and "as one" not in str(found) and isinstance(found, Compensated)


@pytest.mark.parametrize(("samples", "told"), [(20, True), (64, False)])
def test_few_samples_are_told(samples: int, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Of layers with sixteen inputs: with less than 32 rows the least squares fit what is particular to these."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    lrp_prune.prune(model, [torch.randn(samples, 16)], 0.5, method="magnitude", compensation="exact", rounds=2)
    said = [record.message for record in caplog.records if "compensated on few samples" in record.message]
    assert len(said) == told and all("20 rows for 16 inputs" in each for each in said)
