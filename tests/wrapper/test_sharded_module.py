"""``CorrectedModule`` under ``ModelParallelStrategy``: trains, saves, resumes and undoes on divided weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # what checkpoints import: once here, not in each forked process
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lrp_prune.correction import Patch, load_patches
from lrp_prune.distributed.sharding import OtherProcessError
from lrp_prune.wrapper.module import CorrectedModule
from tests.robustness.resumable_training import Classifier
from tests.support.sharding import results, sharded, together, whole
from tests.support.small_models import build
from tests.support.trainers import sharded_trainer as trainer

pytestmark = pytest.mark.processes

PLACES = {"net.0.weight": torch.tensor([0, 5, 150]), "net.6.weight": torch.tensor([1, 63])}


class Plain(Classifier):
    """Draws no random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net[3] = nn.Identity()


def loader() -> DataLoader:
    inputs = torch.randn(48, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(dim=1)), 4)


def entries(module: Any, patch: Patch) -> dict[str, Tensor]:
    return {name: whole(module.get_parameter(name)).view(-1)[patch[name].positions] for name in patch}


class Watch(Callback):
    """What holds at each step; saves after the first epoch."""

    def __init__(self, patch: Patch, file: Path | None) -> None:
        self.patch, self.file, self.begun, self.frozen, self.nonzero = patch, file, None, [], 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.begun = (pl_module.strengths, self.patch.strength_in(pl_module.module))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        for name in self.patch:
            gradient = whole(pl_module.module.get_parameter(name).grad).view(-1)
            self.nonzero += int(gradient[self.patch[name].positions].count_nonzero())

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.frozen.append(self.patch.strength_in(pl_module.module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.file is not None and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.file)


def fit(processes: int, directory: Path, file: Path | None, resume: Path | None, with_patch: str, full: bool) -> Any:
    patch = Patch.from_positions(Plain(), PLACES, behaviour="example")
    other = Patch.from_positions(Plain(), {"net.4.weight": torch.tensor([3])})
    given = {"none": {}, "same": {"example": patch}, "other": {"other": other}}[with_patch]
    corrected, watch = CorrectedModule(Plain(), given, dict.fromkeys(given, 0.5)), Watch(patch, file)
    made = trainer(processes, directory, {"save_distributed_checkpoint": not full}, max_epochs=2, callbacks=[watch])
    made.fit(corrected, loader(), ckpt_path=resume, weights_only=True)
    trained = {name: whole(parameter).clone() for name, parameter in corrected.module.named_parameters()}
    assert watch.begun == ({"example": 0.5}, 0.5)
    assert watch.frozen and set(watch.frozen) == {0.5} and watch.nonzero == 0
    corrected.enable("example", 1.0)
    assert all(not tensor.any() for tensor in entries(corrected.module, patch).values())
    with corrected.uncorrected():
        assert all(torch.equal(v, patch[n].originals) for n, v in entries(corrected.module, patch).items())
    corrected.remove("example")
    assert all(torch.equal(v, patch[n].originals) for n, v in entries(corrected.module, patch).items())
    return trained


@pytest.mark.parametrize("full", [True, False], ids=["full", "sharded"])
def test_training_keeps_patched_entries_and_checkpoints_resume(tmp_path: Path, full: bool) -> None:
    file = tmp_path / "one.ckpt"
    trained, again = results(lambda: fit(2, tmp_path, file, None, "same", full), 2, tmp_path / "first")
    assert all(torch.equal(tensor, again[name]) for name, tensor in trained.items())
    for given in ("other",) if full else ("none", "other"):
        for resumed in results(lambda given=given: fit(2, tmp_path, None, file, given, full), 2, tmp_path / given):
            assert all(torch.equal(tensor, trained[name]) for name, tensor in resumed.items())
    if full:
        results(lambda: fit(1, tmp_path, None, file, "other", full), 1, tmp_path / "alone")
        one = tmp_path / "alone.ckpt"
        results(lambda: fit(1, tmp_path, one, None, "same", full), 1, tmp_path / "plain")
        results(lambda: fit(2, tmp_path, None, one, "other", full), 2, tmp_path / "divided")


def test_save_pretrained_writes_what_one_process_writes(tmp_path: Path) -> None:
    def llama() -> nn.Module:
        torch.manual_seed(0)
        model = build("llama")
        model.tie_weights()
        return model

    model = llama()
    patch = Patch.from_positions(model, {"model.embed_tokens.weight": torch.tensor([3, 400])})

    def check(mesh: Any) -> None:
        corrected = CorrectedModule(sharded(llama(), mesh), {"example": patch}, {"example": 0.5})
        for merged in (True, False):
            folder = tmp_path / str(merged)
            corrected.save_pretrained(folder, merged=merged)
            written = type(model).from_pretrained(folder).state_dict()
            whole_model = llama()
            if merged:
                patch.apply_(whole_model, 0.5)
            expected = whole_model.state_dict()
            assert written.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
        patches, strengths = load_patches(tmp_path / "False")
        assert (patches, strengths) == ({"example": patch}, {"example": 0.5})
        assert corrected.strengths == {"example": 0.5}
        (tmp_path / "file").touch()
        own = OtherProcessError if mesh.get_local_rank() else ValueError
        with pytest.raises(own) as error:
            corrected.save_pretrained(tmp_path / "True", max_shard_size="nonsense")
        assert mesh.get_local_rank() == 0 or "failed in process 0" in str(error.value)

    together(check, 2, tmp_path)
