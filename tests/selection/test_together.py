"""Processes that hold parts select, mask and prune as one process that holds everything, and hold no more than parts."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lrp_prune
from lrp_prune import LRP, Masks, Relevance, Scope
from lrp_prune.distributed.sharding import OtherProcessError
from lrp_prune.training.keeping import MaskKeeper
from tests.support.live_bytes import allocated
from tests.support.sharding import device_type, sharded, together, whole
from tests.support.small_models import build

pytestmark = pytest.mark.processes

SHAPES = {
    "linear": (7, 12),
    "transposed": (12, 8),
    "stacked": (3, 4, 8),
    "stacked_transposed": (2, 8, 4),
    "convolution": (5, 4, 3, 3),
    "small": (1, 8),
}
LAYOUTS = {**{name: name for name in SHAPES}, "small": "linear"}
SCOPES = ("global", "layer", "row", "column", "2:4")


def tied_relevance() -> Relevance:
    """Few different values, so that ties decide."""
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.randint(-6, 6, shape, generator=generator).float() for name, shape in SHAPES.items()}
    return Relevance(values, statistic="signed", layouts=LAYOUTS)


def divided(relevance: Relevance, mesh: Any, dims: dict[str, int]) -> Relevance:
    from torch.distributed.tensor import Shard

    from lrp_prune.distributed.sharding import Sharding

    shardings = {name: Sharding(SHAPES[name], mesh, (Shard(dim),)) for name, dim in dims.items()}
    parts = {
        name: shardings[name].part(relevance[name]).clone() if name in dims else relevance[name] for name in relevance
    }
    options = {"statistic": "signed", "layouts": LAYOUTS, "parameter_shapes": SHAPES}
    return Relevance(parts, shardings=shardings, **options)


@pytest.mark.parametrize("processes", [2, 3])
def test_exactly_what_one_process_selects(tmp_path: Path, processes: int) -> None:
    """Parts of uneven size, empty ones, parts along any dimension, tensors that are whole beside them."""
    relevance = tied_relevance()
    first = dict.fromkeys(SHAPES, 0)
    last = {name: len(shape) - 1 for name, shape in SHAPES.items() if shape[-1] % processes == 0}
    mixed = {"stacked": 1, "transposed": 0, "small": 0}
    expected: dict[int, Any] = {}
    for number, (scope, dims) in enumerate(itertools.product(SCOPES, (first, last, mixed))):
        options = {"order": ("absolute", "signed")[number % 2]}
        if scope == "global":
            options |= {"normalize": (None, "mean", "max")[number % 3], "floor": (0.0, 0.9, 0.5)[number % 3]}
        asked = Scope(scope, **options)
        early = lrp_prune.select(relevance, 0.5, asked)
        late = lrp_prune.select(relevance, 0.5 if scope == "2:4" else 0.7, asked, existing=early)
        expected[number] = (asked, dims, early, late)

    def check(mesh: Any) -> None:
        for number, (asked, dims, early, late) in expected.items():
            parts = divided(relevance, mesh, dims)
            masks = lrp_prune.select(parts, 0.5, asked)
            assert masks.num_pruned == early.num_pruned, (asked, dims)
            assert masks.gathered() == early, (asked, dims)
            for existing in (masks, early):
                target = 0.5 if asked.compared == "2:4" else 0.7
                assert lrp_prune.select(parts, target, asked, existing=existing).gathered() == late
            assert early.divided(parts.shardings) == masks
            if number % 5 == 0:
                file = tmp_path / "masks.safetensors"
                masks.save(file)
                assert Masks.load(file) == early
                assert masks.checksum() == early.checksum()
                assert (~masks).gathered() == ~early and (masks & masks) == masks != ~masks
                state = masks.state_dict()
                if mesh.get_local_rank() == 0:
                    assert Masks.from_state_dict(state) == early
                else:
                    assert not any(name in state["bits"] for name in dims)
        bad = divided(relevance, mesh, first)
        if mesh.get_local_rank() == 0:
            bad._sums["linear"][0, 3] = float("nan")
        for scope in ("global", "row", "column"):
            # What is compared with all others is seen by all; else one process has it, and the others hear of it.
            seen = scope == "global" or mesh.get_local_rank() == 0
            with pytest.raises(ValueError if seen else OtherProcessError, match="infinite or NaN"):
                lrp_prune.select(bad, 0.5, scope=scope)

    together(check, processes, tmp_path)


@pytest.mark.parametrize("processes", [2, 3])
def test_limits_of_tensors_are_those_of_one_process(tmp_path: Path, processes: int) -> None:
    """Whole tensors beside divided ones, tensors that are full at different thresholds, earlier masks beyond the limit."""
    relevance = tied_relevance()
    scales = dict(zip(SHAPES, (1e-3, 1.0, 1e-2, 10.0, 1.0, 1e-4), strict=True))
    relevance = Relevance(
        {name: relevance[name] * scale for name, scale in scales.items()}, statistic="signed", layouts=LAYOUTS
    )
    mixed = {"stacked": 1, "transposed": 0, "linear": 0}
    expected = []
    for order, floor in itertools.product(("absolute", "signed"), (0.5, 0.75, 1.0)):
        early = lrp_prune.select(relevance, 0.3, Scope(order=order, floor=0))
        options = {"scope": Scope(order=order, floor=floor), "existing": early}
        expected.append((options, lrp_prune.select(relevance, 0.6, **options)))
        assert expected[-1][1] != lrp_prune.select(relevance, 0.6, Scope(order=order, floor=0), existing=early)

    def check(mesh: Any) -> None:
        for dims in (dict.fromkeys(SHAPES, 0), mixed):
            parts = divided(relevance, mesh, dims)
            for options, masks in expected:
                found = lrp_prune.select(parts, 0.6, **options)
                assert found.num_pruned == masks.num_pruned == round(0.6 * masks.num_entries)
                assert found.gathered() == masks, (options, dims)

    together(check, processes, tmp_path)


@pytest.mark.parametrize("processes", [2])
def test_a_sharded_model_is_pruned_as_a_whole_one(tmp_path: Path, processes: int) -> None:
    ids = torch.randint(2, 50, (2 * processes, 2, 7), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": entry, "labels": entry} for entry in ids]
    settings: list[dict[str, Any]] = [
        {},
        {"method": "wanda", "scope": "2:4"},
        {"method": "magnitude", "scope": "global"},
        {"method": "random"},
        {"method": "gradient", "scope": "column"},
        {"granularity": "neuron", "rounds": 2},
        {"granularity": "head"},
    ]
    expected = []
    for setting in settings:
        model = build("llama")
        masks = lrp_prune.prune(model, batches, recalibrate=False, **_exact(setting))
        expected.append((masks, [parameter.detach() for parameter in model.parameters()]))

    def check(mesh: Any) -> None:
        for setting, (reference, weights) in zip(settings, expected, strict=True):
            model = sharded(build("llama"), mesh)
            mine = batches[mesh.get_local_rank() :: processes]
            masks = lrp_prune.prune(model, mine, recalibrate=False, **_exact(setting))
            assert masks.num_pruned == reference.num_pruned
            assert masks.gathered() == reference, setting
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                assert torch.equal(whole(parameter), weight)
            again = sharded(build("llama"), mesh)
            reference.apply_(again)  # whole masks on a sharded model
            assert all(
                torch.equal(whole(a), whole(b)) for a, b in zip(again.parameters(), model.parameters(), strict=True)
            )
            with pytest.raises(ValueError, match=r"use masks\.gathered\(\)"):
                masks.apply_(build("llama"))

    together(check, processes, tmp_path)


def _exact(setting: dict[str, Any]) -> dict[str, Any]:
    return setting if setting.get("method") in ("magnitude", "random") else {**setting, "matmul_dtype": None}


@pytest.mark.parametrize("recalibrate", [False, True])
def test_an_error_leaves_a_sharded_model_as_it_was(tmp_path: Path, recalibrate: bool) -> None:
    """In a later round, and while the first is recalibrated."""
    batch = {"input_ids": torch.arange(3, 10)[None], "labels": torch.arange(3, 10)[None]}

    def check(mesh: Any) -> None:
        model, calls = sharded(build("llama"), mesh), []

        def target(model: nn.Module, batch: Any) -> torch.Tensor:
            calls.append(1)
            return model(**batch).logits.sum() * (float("nan") if len(calls) > 2 else 1.0)

        before = [whole(parameter) for parameter in model.parameters()]
        with pytest.raises(FloatingPointError):
            lrp_prune.prune(model, [batch], method=LRP(target=target), rounds=3, recalibrate=recalibrate)
        assert len(calls) == 3
        assert all(torch.equal(whole(after), known) for after, known in zip(model.parameters(), before, strict=True))

    together(check, 2, tmp_path)


WIDTH, DEPTH = 256, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.down(self.up(inputs).relu())


def deep() -> nn.Module:
    torch.manual_seed(0)
    blocks = [Block() for _ in range(DEPTH)]
    return nn.Sequential(nn.Linear(4, WIDTH, bias=False), *blocks, nn.Linear(WIDTH, 4, bias=False))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3])
def test_no_process_holds_more_than_its_part_and_one_layer(tmp_path: Path, processes: int) -> None:
    weights = DEPTH * 4 * WIDTH * WIDTH
    layer = 4 * weights // DEPTH
    small = 200_000
    batches = [(torch.randn(2, 4), torch.tensor([0, 1]))]

    def check(mesh: Any) -> None:
        model = deep().to(mesh.device_type)
        model = sharded(model, mesh, list(model)[1:-1])
        part = 4 * sum(parameter.to_local().numel() for parameter in model.parameters())
        assert part < 4 * weights / processes + small
        everything = partial(lrp_prune.attribute, model, batches, statistic="geometric")
        relevance = everything()
        assert sum(tensor.nbytes for tensor in relevance.sums.values()) <= part + small
        # With everything scored, against a pass that scores almost nothing. gloo's threads let go of what they have sent
        # a little later at some times than at others: the least of five.
        one = partial(everything, include=["0.*"])
        without, most = (min(allocated(each)[2] for _ in range(5)) for each in (one, everything))
        assert most - without <= part + layer + small
        for scope in ("global", "row"):
            masks, _, most = allocated(partial(lrp_prune.select, relevance, 0.5, scope=scope))
            assert sum(masks.bits(name).nbytes for name in masks) <= part / 32 + small
            assert most <= part + layer + small, scope
        keeper, _, most = allocated(lambda: MaskKeeper(model, masks))
        assert keeper.nbytes <= part / 4 and most <= part / 4 + layer + small
        saves = [allocated(lambda: relevance.save(tmp_path / "relevance.safetensors"))[1:] for _ in range(6)]
        kept, most = map(min, zip(*saves, strict=True))  # the least, for the same reason
        assert most <= 3 * layer and kept < small
        state, kept, most = allocated(masks.state_dict)
        assert most <= weights / 8 + 2 * layer
        if mesh.get_local_rank():
            assert not state["bits"] and min(kept, *(allocated(masks.state_dict)[1] for _ in range(5))) < small
        else:  # all take part in what is brought together
            for _ in range(5):
                masks.state_dict()

    if device_type(processes) == "cuda":
        pytest.skip("counts the CPU's allocations")
    together(check, processes, tmp_path)
