"""A model that ``fully_shard`` has divided comes to what one process comes to with the whole of it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.pruning import LeastSquares, Masks, scorer
from lrp_prune.pruning.compensation import Compensated, compensate_
from lrp_prune.pruning.compensation.ways import Compensation
from tests.support.compensation import EXACT, WAYS, half, mlp
from tests.support.sharding import sharded, together, whole
from tests.support.small_models import build

pytestmark = pytest.mark.processes

Layers = Callable[[nn.Module], list[nn.Module]]


def compensated(
    model: nn.Module, masks: Masks, each: list[list[Any]], way: Compensation, layers: Layers, directory: Path
) -> list[tuple[dict[str, Tensor], Compensated]]:
    """What processes that have a part each come to, with their own batches."""

    def run(mesh: Any) -> Any:
        mine = copy.deepcopy(model)
        sharded(mine, mesh, layers(mine))
        found = compensate_(mine, masks, each[mesh.get_local_rank()], way)
        return {name: whole(value) for name, value in mine.named_parameters()}, found

    return together(run, len(each), directory)


def check_equal(
    dense: nn.Module, masks: Masks, each: list[list[Any]], way: Compensation, layers: Layers, directory: Path,
    tolerance: float = 1e-8,
) -> Compensated:  # fmt: skip
    model = copy.deepcopy(dense)
    found = compensate_(model, masks, [batch for batches in each for batch in batches], way)
    theirs = compensated(dense, masks, each, way, layers, directory)
    for values, result in theirs:
        assert result.left_out == found.left_out and result.samples == found.samples
        assert set(result.errors) == set(found.errors) and found.errors
        for name, (before, after) in found.errors.items():
            assert result.errors[name] == pytest.approx((before, after), rel=1e-3 if tolerance > 1e-6 else 1e-6), name
        for name, value in model.named_parameters():
            assert torch.equal(values[name], theirs[0][0][name]), name
            torch.testing.assert_close(values[name], value.detach(), rtol=tolerance, atol=tolerance / 100, msg=name)
    return found


def linear_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)][:2]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_each_process_has_a_part_and_batches_of_its_own(tmp_path: Path, way: Compensation) -> None:
    model, batches = mlp()
    masks = half(model, ["0.weight", "2.weight", "4.weight"])
    each = [batches[:2], [(batches[2][0], batches[2][1]), (batches[0][0][:20] + 1, batches[0][1][:20])]]
    found = check_equal(model, masks, each, way, linear_layers, tmp_path)
    assert set(found.errors) == {"0.weight", "2.weight", "4.weight"}


def convolutions() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, groups=4), nn.ReLU(),
        nn.Conv2d(12, 12, 3, groups=12), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5),
    ).double()  # fmt: skip
    return model, [torch.randn(12, 3, 7, 7).double() for _ in range(4)]


def test_convolutions_in_groups_and_layers_with_fewer_rows_than_processes(tmp_path: Path) -> None:
    """Of a depthwise convolution each filter is a row by itself."""
    model, batches = convolutions()
    masks = half(model, ["0.weight", "2.weight", "4.weight", "7.weight"])
    found = check_equal(model, masks, [batches[:2], batches[2:]], EXACT, lambda model: [model[0], model[2]], tmp_path)
    assert set(found.errors) == {"0.weight", "2.weight", "4.weight", "7.weight"}


def test_processes_compute_the_same_again_where_only_one_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage is run by all of them or by none."""
    model, batches = mlp()
    masks = half(model, ["0.weight", "2.weight", "4.weight"])
    size = batches[1][0].nbytes
    monkeypatch.setattr("lrp_prune.pruning.compensation.reading.ROOM", 2 * size)
    longer = [(torch.cat([x, x[:9]]), torch.cat([y, y[:9]])) for x, y in batches[:2]]
    check_equal(model, masks, [batches[:2], longer], EXACT, linear_layers, tmp_path)


@pytest.mark.parametrize(("name", "tolerance"), [("llama", 1e-8), ("gpt2", 1e-8), ("mixtral", 1e-3)])
def test_transformers(tmp_path: Path, name: str, tolerance: float) -> None:
    torch.manual_seed(0)
    model = build(name).to(torch.float32 if name == "mixtral" else torch.float64)  # torch groups experts in float32
    way = LeastSquares(damping=0.1, steps=500, tolerance=1e-7 if name == "mixtral" else 1e-12)
    masks = lrp_prune.select(scorer("random", model).compute(), 0.5, scope="layer")
    each = [[{"input_ids": torch.randint(2, 50, (samples, 12))} for samples in sizes] for sizes in ((4, 4), (4, 2))]

    def layers(model: Any) -> list[nn.Module]:
        return list(model.transformer.h if name == "gpt2" else model.model.layers)

    check_equal(model, masks, each, way, layers, tmp_path, tolerance)


def test_replicas_of_parts_each_have_batches_of_their_own(tmp_path: Path) -> None:
    model, batches = mlp()
    masks = half(model, ["0.weight", "2.weight", "4.weight"])
    each = [
        [(inputs[start : start + 30], labels[start : start + 30])]
        for inputs, labels in batches[:2]
        for start in (0, 30)
    ]

    def call(mesh: Any) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        both = init_device_mesh(mesh.device_type, (2, 2), mesh_dim_names=("replicate", "shard"))
        mine = sharded(mine := copy.deepcopy(model), both, [mine[0]])
        found = compensate_(mine, masks, each[mesh.get_local_rank()], EXACT)
        return {name: whole(value) for name, value in mine.named_parameters()}, found.samples

    (first, samples), *others = together(call, 4, tmp_path)
    alone = copy.deepcopy(model)
    assert samples == compensate_(alone, masks, [batch for theirs in each for batch in theirs], EXACT).samples == 120
    for values, _ in others:
        assert all(torch.equal(values[name], first[name]) for name in first)
    for name, value in alone.named_parameters():
        torch.testing.assert_close(first[name], value.detach(), rtol=1e-8, atol=1e-10, msg=name)


class Choosing(nn.Module):
    """Each sample goes to one of two layers; a process may have none for one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.out = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        kinds, x = x[:, :1], x[:, 1:]
        made = torch.zeros_like(x)
        for kind, expert in enumerate(self.experts):
            chosen = kinds[:, 0] == kind
            if bool(chosen.any()):
                made[chosen] = expert(x[chosen]).relu()
        return torch.cat([kinds, self.out(made) + x], 1)


def of_kind(kind: int) -> list[Tensor]:
    return [torch.cat([torch.full((40, 1), kind), torch.randn(40, 6)], 1).double()]


def test_a_layer_that_one_process_does_not_use(tmp_path: Path) -> None:
    """All run the block to its end; what is itself a stage has to be run by all, and is named where it is not."""
    torch.manual_seed(0)
    model, each = nn.Sequential(Choosing(), Choosing()).double(), [of_kind(0), of_kind(1)]
    masks = half(model, [name for name, value in model.named_parameters() if value.dim() > 1])
    assert len(check_equal(model, masks, each, EXACT, list, tmp_path / "blocks").errors) == 6
    single = Choosing().double()
    masks = half(single, ["experts.0.weight", "experts.1.weight", "out.weight"])
    for values, found in compensated(single, masks, each, EXACT, lambda model: [model.out], tmp_path / "layers"):
        reason = "is not run with every batch, as processes have to that run it together"
        assert found.left_out == {"experts.0.weight": reason, "experts.1.weight": reason} and len(found.errors) == 1
        assert not values["experts.0.weight"][~masks["experts.0.weight"]].any()


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_in_one_call_of_prune_and_back_after_an_error(tmp_path: Path, precision: torch.dtype | None) -> None:
    """Masks are divided here; weights stay what the model is trained in, whatever it computes in."""
    torch.manual_seed(0)
    dense, batches = build("llama"), [{"input_ids": torch.randint(2, 50, (4, 12))} for _ in range(4)]
    way = LeastSquares(
        damping=0.05, tolerance=1e-6, steps=500
    )  # what is chosen of few samples depends on which of them are together

    def call(mesh: Any) -> Any:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        policy = MixedPrecisionPolicy() if precision is None else MixedPrecisionPolicy(param_dtype=precision)
        first, mine = mesh.get_local_rank() == 0, sharded(copy.deepcopy(dense), mesh, mp_policy=policy)
        theirs = batches[:2] if first else batches[2:]
        with pytest.raises(ValueError, match=r"the processes have \[2, 1\] batches: .* give each the same number"):
            lrp_prune.prune(mine, theirs if first else theirs[:1], 0.5, "random", compensation=way, progress=False)
        handle = mine.model.layers[1].mlp.down_proj.register_forward_pre_hook(
            lambda _, given: (given[0] * float("nan"),)
        )
        with pytest.raises(FloatingPointError, match=r"down_proj\.weight are not finite"):
            lrp_prune.prune(mine, theirs, 0.5, "random", compensation=way, progress=False)
        handle.remove()
        for name, value in mine.named_parameters():
            assert torch.equal(whole(value), dense.get_parameter(name)), name
        masks = lrp_prune.prune(mine, theirs, 0.5, "random", compensation=way, progress=False)
        values = {name: whole(value) for name, value in mine.named_parameters()}
        return values, masks.gathered()

    (values, masks), (others, _) = together(call, 2, tmp_path)
    model = copy.deepcopy(dense)
    assert lrp_prune.prune(model, batches, 0.5, "random", compensation=way, progress=False) == masks
    for name, value in model.named_parameters():
        assert torch.equal(values[name], others[name]) and values[name].dtype == torch.float32
        if name in masks:
            assert not values[name][~masks[name]].any()
        apart = (values[name] - value.detach()).norm() / value.detach().norm()
        assert apart < (1e-3 if precision is None else 0.1), (name, apart)
