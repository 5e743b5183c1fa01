"""Processes that recalibrate one model together come to what one process comes to on all of their batches."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Masks
from lrp_prune.pruning import scorer
from lrp_prune.pruning.moments import PairedMoments
from lrp_prune.pruning.processes import Processes, Turns
from lrp_prune.pruning.recalibration import recalibrate
from tests.support.sharding import sharded, together, whole
from tests.support.small_models import build

pytestmark = pytest.mark.processes


class Vision(nn.Module):
    """Sizes that no number of processes divides; a batch normalization with buffers; what is written into in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(7, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
        self.head = nn.Linear(20, 3)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.head(self.second(self.first(images)).flatten(1))
        return result


class Attending(nn.Module):
    """A fused projection, of which queries are one part, and keys with values another."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        other = x.roll(1, 1)
        result: Tensor = self.head(self.attention(x, other, other, need_weights=False)[0].mean(1))
        return result


class Reading(nn.Module):
    """Gates of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(6, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.layer(x)[0].mean(1))
        return result


def vision() -> tuple[nn.Module, list[str], Callable[[torch.Generator], Any]]:
    model = Vision()
    for _ in range(20):
        model.train()(torch.randn(16, 3, 6, 6))
    return (
        model.eval(),
        ["first", "second.1", "second"],
        lambda generator: (torch.randn(8, 3, 6, 6, generator=generator),),
    )


def attending() -> tuple[nn.Module, list[str], Callable[[torch.Generator], Any]]:
    return Attending().eval(), ["attention"], lambda generator: (torch.randn(8, 5, 6, generator=generator),)


def reading() -> tuple[nn.Module, list[str], Callable[[torch.Generator], Any]]:
    return Reading().eval(), ["layer"], lambda generator: (torch.randn(8, 5, 6, generator=generator),)


def llama() -> tuple[nn.Module, list[str], Callable[[torch.Generator], Any]]:
    def batch(generator: torch.Generator) -> dict[str, Tensor]:
        ids = torch.randint(2, 50, (2, 7), generator=generator)
        return {"input_ids": ids, "labels": ids}

    return build("llama").eval(), ["model.layers.0", "model.layers.1"], batch


CASES = {"vision": vision, "attending": attending, "reading": reading, "llama": llama}


def case(name: str, processes: int) -> tuple[nn.Module, list[str], list[list[Any]], list[Any]]:
    """A model, what is sharded, batches of each process, and the same batches as one process takes them."""
    torch.manual_seed(0)
    model, layers, batch = CASES[name]()
    generator = torch.Generator().manual_seed(1)
    each = [[batch(generator) for _ in range(4)] for _ in range(processes)]
    union = [entry for mine in each for entry in mine[:-1]] + [mine[-1] for mine in each]  # judged by the last
    return model, layers, each, union


def masks_of(model: nn.Module, sparsity: float) -> Masks:
    return lrp_prune.select(scorer(lrp_prune.Random(seed=0), model).compute(), sparsity, scope="layer")


@pytest.mark.parametrize(("name", "processes"), [("vision", 3), ("attending", 2), ("reading", 3), ("llama", 2)])
def test_a_sharded_model_is_recalibrated_as_a_whole_one(tmp_path: Path, name: str, processes: int) -> None:
    model, layers, each, union = case(name, processes)
    masks = masks_of(model, 0.6)
    target = "next_token" if name == "llama" else "class"
    expected = recalibrate(model, masks, union, target)
    assert expected.strength > 0 and len(expected.scales) > 1
    mended = copy.deepcopy(model)
    masks.apply_(mended)
    expected.apply_(mended)

    def check(mesh: Any) -> None:
        divided = copy.deepcopy(model)
        divided = sharded(divided, mesh, [divided.get_submodule(layer) for layer in layers])
        before = [whole(parameter) for parameter in divided.parameters()]
        found = recalibrate(divided, masks, each[mesh.get_local_rank()], target)
        assert all(map(torch.equal, before, (whole(parameter) for parameter in divided.parameters())))
        assert found.strength == expected.strength
        assert found.divergences == pytest.approx(expected.divergences, rel=1e-4)
        assert found.parameters == expected.parameters
        masks.apply_(divided)
        found.apply_(divided)
        for (entry, parameter), other in zip(divided.named_parameters(), mended.parameters(), strict=True):
            torch.testing.assert_close(whole(parameter), other.detach(), rtol=1e-4, atol=1e-5, msg=entry)
        for (entry, buffer), other in zip(divided.named_buffers(), mended.buffers(), strict=True):
            torch.testing.assert_close(buffer.cpu(), other, rtol=1e-4, atol=1e-5, msg=entry)

    together(check, processes, tmp_path)


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_prune_recalibrates_a_sharded_model(tmp_path: Path, sparsity: float) -> None:
    """In one round, and in two, of which the second begins with the dense weights."""
    model, layers, each, union = case("vision", 2)
    expected = copy.deepcopy(model)
    options: dict[str, Any] = {"method": lrp_prune.Magnitude(target="class"), "rounds": 1 if sparsity < 0.6 else 2}
    labelled = [[(batch[0], torch.zeros(8, dtype=torch.long)) for batch in batches] for batches in (*each, union)]
    masks = lrp_prune.prune(expected, labelled[-1], sparsity, **options)
    plain = copy.deepcopy(model)
    lrp_prune.prune(plain, labelled[-1], sparsity, recalibrate=False, **options)
    assert not torch.equal(plain.head.weight, expected.head.weight)

    def check(mesh: Any) -> None:
        divided = copy.deepcopy(model)
        divided = sharded(divided, mesh, [divided.get_submodule(layer) for layer in layers])
        found = lrp_prune.prune(divided, iter(labelled[mesh.get_local_rank()]), sparsity, **options)
        assert found.gathered() == masks
        for (entry, parameter), other in zip(divided.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(whole(parameter), other.detach(), rtol=1e-4, atol=1e-5, msg=entry)

    together(check, 2, tmp_path)


def test_replicas_of_a_sharded_model(tmp_path: Path) -> None:
    """A mesh of two dimensions, along one of which nothing is divided."""
    from torch.distributed.device_mesh import init_device_mesh

    model, layers, each, union = case("attending", 2)
    masks = masks_of(model, 0.6)
    mended = copy.deepcopy(model)
    expected = recalibrate(model, masks, union, "class")
    masks.apply_(mended)
    expected.apply_(mended)

    def check(mesh: Any) -> None:
        copies = init_device_mesh(mesh.device_type, (2, 1), mesh_dim_names=("replicas", "parts"))
        divided = copy.deepcopy(model)
        divided = sharded(divided, copies, [divided.get_submodule(layer) for layer in layers])
        found = recalibrate(divided, masks, each[mesh.get_local_rank()], "class")
        assert found.divergences == pytest.approx(expected.divergences, rel=1e-4)
        masks.apply_(divided)
        found.apply_(divided)
        for (entry, parameter), other in zip(divided.named_parameters(), mended.parameters(), strict=True):
            torch.testing.assert_close(whole(parameter), other.detach(), rtol=1e-4, atol=1e-5, msg=entry)

    together(check, 2, tmp_path)


@pytest.mark.parametrize("divided", [False, True])
def test_batches_that_one_process_has_more_of(tmp_path: Path, divided: bool) -> None:
    """Of two lengths, so that they cannot all be laid together: the other process goes along, and what it runs does not count."""
    model, layers, (first, second), _ = case("attending", 2)
    first = [*first, *case("attending", 3)[2][2]]
    longer, shorter, judged = first[:3], [(batch[0][:, :3],) for batch in first[3:6]], first[6:]
    masks = masks_of(model, 0.6)
    expected = recalibrate(model, masks, [*longer, *second[:3], *shorter, *judged, second[3]], "class")
    mended = copy.deepcopy(model)
    masks.apply_(mended)
    expected.apply_(mended)

    def check(mesh: Any) -> None:
        mine = copy.deepcopy(model)
        if divided:
            mine = sharded(mine, mesh, [mine.get_submodule(layer) for layer in layers])
        batches = second if mesh.get_local_rank() else [*longer, *shorter, *judged]
        found = recalibrate(mine, masks, batches, "class", together=not divided)
        assert found.divergences == pytest.approx(expected.divergences, rel=1e-4)
        masks.apply_(mine)
        found.apply_(mine)
        for (entry, parameter), other in zip(mine.named_parameters(), mended.parameters(), strict=True):
            torch.testing.assert_close(whole(parameter), other.detach(), rtol=1e-4, atol=1e-5, msg=entry)

    together(check, 2, tmp_path)


@pytest.mark.parametrize("divided", [False, True])
def test_an_error_in_one_process_is_told_to_all_and_changes_nothing(tmp_path: Path, divided: bool) -> None:
    model, layers, each, _ = case("vision", 2)
    masks = masks_of(model, 0.6)
    each[1][-1][0][0, 0, 0, 0] = float("nan")  # where scales are judged

    def check(mesh: Any) -> None:
        mine = copy.deepcopy(model)
        if divided:
            mine = sharded(mine, mesh, [mine.get_submodule(layer) for layer in layers])
        with pytest.raises((FloatingPointError, RuntimeError), match="the dense model's output is not finite"):
            recalibrate(mine, masks, each[mesh.get_local_rank()], "class", together=not divided)
        with pytest.raises((ValueError, RuntimeError), match="no batch was seen"):
            recalibrate(mine, masks, each[0] if mesh.get_local_rank() else [], "class", together=not divided)
        for parameter, other in zip(mine.parameters(), model.parameters(), strict=True):
            assert torch.equal(whole(parameter), other.detach())

    together(check, 2, tmp_path)


def test_parameters_that_were_gathered_in_inference_mode_are_refused_by_name(tmp_path: Path) -> None:
    model, layers, each, _ = case("vision", 2)

    def check(mesh: Any) -> None:
        mine = copy.deepcopy(model)
        mine = sharded(mine, mesh, [mine.get_submodule(layer) for layer in layers])
        before = [whole(parameter) for parameter in mine.parameters()]
        with torch.inference_mode():
            mine(each[0][0][0])
        with pytest.raises(RuntimeError, match=r"was gathered in inference mode before.*under torch\.no_grad"):
            lrp_prune.prune(mine, each[mesh.get_local_rank()], method=lrp_prune.Magnitude(target="class"))
        assert all(map(torch.equal, before, (whole(parameter) for parameter in mine.parameters())))

    together(check, 2, tmp_path)


def test_sums_are_made_in_one_order_whatever_one_process_runs(tmp_path: Path) -> None:
    """What one leaves out it takes part in with nothing; what not all have seen is no sum."""

    def moments(value: float) -> PairedMoments:
        made = PairedMoments(2)
        made.add(torch.full((3, 2), value) + torch.arange(3)[:, None], torch.full((3, 2), 2 * value))
        return made

    def check(mesh: Any) -> None:
        rank = mesh.get_local_rank()
        processes = Processes(mesh)
        seen = [("a", 2), ("b", 2), ("own", 2), ("c", 2)] if rank else [("a", 2), ("b", 2), ("c", 2)]
        turns = Turns(processes, seen)
        for _ in range(2):
            with turns.taken():
                if rank:
                    assert turns.summed("a", moments(1.0)) is not None
                found = turns.summed("b", moments(1.0 + rank))
                assert found is not None and found.count == 6
                whole = moments(1.0)
                whole.merge([moments(2.0)])
                torch.testing.assert_close(found.fit(1.0, True), whole.fit(1.0, True))
                assert turns.summed("own", moments(1.0)) is None and turns.summed("b", moments(1.0)) is None
                if not rank:
                    alone = turns.summed("c", moments(1.0))
                    assert alone is not None and alone.count == 3
        crossed = Turns(processes, [("a", 2), ("b", 2), ("c", 2)] if rank else [("a", 2), ("c", 2), ("b", 2)])
        with crossed.taken():
            assert crossed.summed("a", moments(1.0)) is not None
            assert crossed.summed("b", moments(1.0)) is None and crossed.summed("c", moments(1.0)) is None

    together(check, 2, tmp_path)
