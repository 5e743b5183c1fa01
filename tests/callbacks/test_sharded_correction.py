"""``ContrastiveCorrection`` on sharded weights: the patch of one process, handed over, searched for and resumed."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # what checkpoints import: once here, not in each forked process
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lrp_prune import LRP
from lrp_prune.callbacks import ContrastiveCorrection, Guard
from lrp_prune.correction import Automatic, Patch
from lrp_prune.distributed.sharding import OtherProcessError
from lrp_prune.wrapper.module import CorrectedModule
from tests.robustness.resumable_training import Classifier, Loader
from tests.support.sharding import results, whole
from tests.support.trainers import sharded_trainer as trainer

pytestmark = pytest.mark.processes

SETS: list[dict[str, Any]] = [
    {},
    {"guard": Guard(0.5, by="squared_token", scope="layer")},
    {"granularity": "neuron", "amount": 3, "guard": None},
    {"undesired": 0, "general": 1, "reverse": True, "normalize": "mean", "include": ["net.4"]},
]


class Validated(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)


def size(model: nn.Module) -> float:
    """Of what is there; the same in each process."""
    return float(sum(whole(parameter).abs().sum() for parameter in model.parameters()))


def skewed(model: nn.Module) -> float:
    """Another number in each process, of which the mean is that of one process."""
    value = size(model)
    if not torch.distributed.is_initialized():
        return value
    return 7.0 if torch.distributed.get_rank() == 1 else 2 * value - 7.0


def loaders() -> list[Loader]:
    return [Loader(seed=3, samples=16), Loader(seed=4, samples=16)]


def test_the_patch_is_that_of_one_process(tmp_path: Path) -> None:
    def validate(processes: int) -> Any:
        common: dict[str, Any] = {"amount": 20, "method": LRP(target="class")}
        sets = [
            ContrastiveCorrection(**{**common, **options}, behaviour=f"set {number}")
            for number, options in enumerate(SETS)
        ]
        data = [list(Loader(seed=seed, samples=16)) for seed in (3, 4)]
        sets.append(ContrastiveCorrection(**common, general=data[0], undesired=data[1], behaviour="reference"))
        amount = Automatic(amounts=[5, 20, 80], reduction=0.001, allowed=1.0)
        measures = {"undesired_metric": skewed, "general_metric": size}
        sets.append(ContrastiveCorrection(**{**common, "amount": amount}, behaviour="auto", **measures))
        module = Validated()
        before = [parameter.clone() for parameter in module.parameters()]
        made = trainer(processes, tmp_path, callbacks=sets)
        (logged,) = made.validate(module, loaders(), verbose=False)[:1]
        assert all(torch.equal(old, whole(new)) for old, new in zip(before, module.parameters(), strict=True))
        patches = [correction.patch.state_dict() for correction in sets]
        numbers = [(trial.entries, round(trial.reduction, 6)) for trial in sets[-1].search.curve]
        return patches, numbers, logged["correction/entries"] > 0

    (expected,) = results(lambda: validate(1), 1, tmp_path / "one")
    for patches, curve, logged in results(lambda: validate(2), 2, tmp_path / "two"):
        assert logged
        assert curve == expected[1]
        for number, (patch, wanted) in enumerate(zip(patches, expected[0], strict=True)):
            assert patch["description"]["checksums"] == wanted["description"]["checksums"], number
            for name, tensor in wanted["tensors"].items():
                assert torch.equal(patch["tensors"][name], tensor), (number, name)


class Watch(Callback):
    def __init__(self, correction: ContrastiveCorrection, file: Path | None) -> None:
        self.correction, self.file, self.strengths, self.wrong = correction, file, [], 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.strengths.append(pl_module.strengths)
        if "undesired" in pl_module.strengths:
            self.wrong += self.correction.patch.strength_in(pl_module.module) != 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.file is not None and trainer.current_epoch == 1:
            trainer.save_checkpoint(self.file)


def test_a_training_gets_the_patch_keeps_it_and_resumes(tmp_path: Path) -> None:
    def fit(file: Path | None, resume: Path | None) -> Any:
        correction = ContrastiveCorrection(
            method=LRP(target="class"), amount=20, undesired_metric=size, general_metric="val_loss/dataloader_idx_0"
        )
        watch, corrected = Watch(correction, file), CorrectedModule(Validated())
        made = trainer(2, tmp_path, max_epochs=3, callbacks=[correction, watch])
        made.fit(corrected, Loader(seed=1), loaders(), ckpt_path=resume, weights_only=True)
        kept: dict[str, Tensor] = {name: whole(tensor) for name, tensor in corrected.module.named_parameters()}
        zeros = all(not kept[name].view(-1)[correction.patch[name].positions].any() for name in correction.patch)
        logged = {name: float(value) for name, value in made.callback_metrics.items() if "correction" in name}
        return watch.strengths, watch.wrong, zeros, correction.patch.state_dict()["tensors"], logged

    file = tmp_path / "two.ckpt"
    (first, second) = results(lambda: fit(file, None), 2, tmp_path / "first")
    for strengths, wrong, zeros, _, logged in (first, second):
        assert strengths == [{}] * 6 + [{"undesired": 1.0}] * 12
        assert wrong == 0 and zeros
        assert logged == first[4]
        assert "correction/undesired" in logged
    for strengths, wrong, zeros, patch, _ in results(lambda: fit(None, file), 2, tmp_path / "again"):
        assert strengths == [{"undesired": 1.0}] * 6
        assert wrong == 0 and zeros
        assert all(torch.equal(tensor, first[3][name]) for name, tensor in patch.items())


def test_a_patch_made_within_an_epoch_is_handed_over_with_the_values_of_its_end(tmp_path: Path) -> None:
    def fit() -> Any:
        correction = ContrastiveCorrection(method=LRP(target="class"), amount=20)
        watch, corrected = Watch(correction, None), CorrectedModule(Validated())
        corrected.add("other", Patch.from_positions(corrected.module, {"net.4.weight": torch.tensor([3, 200])}), 0.5)
        options = {"max_epochs": 2, "val_check_interval": 0.5, "num_sanity_val_steps": 0}
        made = trainer(2, tmp_path, callbacks=[correction, watch], **options)
        made.fit(corrected, Loader(seed=1), loaders())
        corrected.disable("undesired")
        undone = correction.patch.strength_in(corrected.module)
        return watch.strengths, watch.wrong, undone, corrected.patches["undesired"] == correction.patch

    for strengths, wrong, undone, same in results(fit, 2, tmp_path):
        assert strengths == [{"other": 0.5}] * 6 + [{"other": 0.5, "undesired": 1.0}] * 6
        assert (wrong, undone, same) == (0, 0.0, True)


def test_what_fails_in_one_process_stops_all(tmp_path: Path) -> None:
    def broken(model: nn.Module) -> float:
        if torch.distributed.get_rank() == 1:
            raise ZeroDivisionError("no sentence was profane")
        return 1.0

    def validate() -> tuple[str, str]:
        messages = []
        failing = {"undesired_metric": broken, "general_metric": size, "amount": "auto"}
        own = (OtherProcessError, ZeroDivisionError)[int(os.environ["RANK"])]
        for options, kind in ((failing, own), ({"amount": 10_000}, MisconfigurationException)):
            correction = ContrastiveCorrection(method=LRP(target="class"), **options)
            with pytest.raises(kind) as error:
                trainer(2, tmp_path, callbacks=[correction]).validate(Validated(), loaders(), verbose=False)
            messages.append(str(error.value))
        return tuple(messages)

    first, second = results(validate, 2, tmp_path)
    assert "rank 1 failed" in first[0] and "no sentence was profane" in first[0]
    assert second[0] == "no sentence was profane"
    assert first[1] == second[1] and "may be removed" in first[1]
