"""Patches in a data-parallel training, and of sharded parameters."""

import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from lrp_prune.correction import Patch
from lrp_prune.correction.corrections import Corrections
from lrp_prune.wrapper.module import CorrectedModule
from tests.support.trainers import forked

pytestmark = pytest.mark.processes

POSITIONS, LAST = torch.tensor([0, 5, 9]), "net.4.weight"


@pytest.mark.slow
def test_data_parallel_training_keeps_patched_entries_on_all_ranks(everything, loader, trainer, tmp_path: Path) -> None:
    module = everything()
    originals = module.net[4].weight.detach().view(-1)[POSITIONS].clone()
    corrected = CorrectedModule(module, {"example": Patch.from_positions(module, {LAST: POSITIONS})}, {"example": 0.5})

    class Save(Callback):
        def on_train_end(self, trainer, pl_module) -> None:
            weight = pl_module.net[4].weight.detach().clone()
            during = weight.view(-1)[POSITIONS].clone()
            pl_module.disable("example")
            after = pl_module.net[4].weight.detach().view(-1)[POSITIONS].clone()
            logged = float(trainer.callback_metrics["accuracy"])
            (tmp_path / f"{trainer.global_rank}").write_bytes(pickle.dumps((weight, during, after, logged)))

    trainer(devices=2, strategy=forked(), max_epochs=1, callbacks=[Save()], use_distributed_sampler=True).fit(
        corrected, loader(), loader(seed=2)
    )
    first, second = (pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in (0, 1))
    for weight, during, after, _ in (first, second):
        assert torch.equal(during, originals * 0.5)
        assert torch.equal(after, originals)
        assert not torch.equal(weight, module.net[4].weight)
    assert torch.equal(first[0], second[0])
    assert first[3] == second[3]


def _sharded(rank: int, path: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        torch.manual_seed(0)
        whole = torch.nn.Linear(4, 5, bias=False)
        patch = Patch.from_positions(whole, {"weight": torch.tensor([0, 7, 11, 12, 19])})
        model = torch.nn.Linear(4, 5, bias=False)
        for dim in (0, 1):
            model.weight = torch.nn.Parameter(distribute_tensor(whole.weight.detach(), mesh, [Shard(dim)]))
            patch.apply_(model)
            expected = whole.weight.detach().clone()
            expected.view(-1)[patch["weight"].positions] = 0
            assert torch.equal(model.weight.full_tensor(), expected)
            patch.revert_(model)
            assert torch.equal(model.weight.full_tensor(), whole.weight)
            corrections = Corrections(model)
            corrections.add("example", patch)
            corrections.enable("example", 0.5)
            corrections.disable("example")
            assert torch.equal(model.weight.full_tensor(), whole.weight)
        local = model.weight.detach().to_local()
        if rank == 1:  # the first rank's shard is right, and it must hear of the other's
            local[4, 1] += 1
        message = None
        try:
            patch.apply_(model)
        except ValueError as error:
            message = str(error)
        assert message is not None
        assert "other values" in message
        Path(path, f"done{rank}").touch()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_parameters_are_patched_each_process_its_part(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=_sharded, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert (tmp_path / "done0").exists()
    assert (tmp_path / "done1").exists()
