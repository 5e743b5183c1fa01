"""Lightning leaves out the validation after a checkpoint of an epoch's last step: callbacks that work in validations say so."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lrp_prune import LRP
from lrp_prune.callbacks import ContrastiveCorrection, RelevanceCollector

pytestmark = pytest.mark.slow


def correction() -> ContrastiveCorrection:
    return ContrastiveCorrection(behaviour="example", method=LRP(target="class"), amount=5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (correction, "ContrastiveCorrection makes its patch at the end of a later one"),
        (RelevanceCollector, "RelevanceCollector collects at the end of a later one"),
    ],
    ids=["correction", "collector"],
)
@pytest.mark.parametrize("step", [4, 6], ids=["last of an epoch", "within one"])
def test_it_is_told(
    make_module, make_loader, make_trainer, recwarn, tmp_path: Path, make: Any, says: str, step: int
) -> None:
    written = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    loaders = [make_loader(seed=2), make_loader(seed=3)]

    def fit(callbacks: list[Callback], **options: Any) -> None:
        trainer = make_trainer(callbacks=callbacks, max_epochs=3, enable_checkpointing="ckpt_path" not in options)
        trainer.fit(make_module(), make_loader(), loaders, **options)

    fit([written])
    fit([make()], ckpt_path=tmp_path / f"step={step}.ckpt")
    told = [str(entry.message) for entry in recwarn if says in str(entry.message)]
    assert len(told) == (step == 4)
    assert all("before the validation of epoch 0, which Lightning takes for done" in each for each in told)


def test_one_that_would_have_done_nothing_is_not(
    make_module, make_loader, make_trainer, recwarn, tmp_path: Path
) -> None:
    written = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    for callback, path in ((written, None), (RelevanceCollector(every_n_epochs=2), tmp_path / "step=4.ckpt")):
        trainer = make_trainer(callbacks=[callback], max_epochs=2, enable_checkpointing=path is None)
        trainer.fit(make_module(), make_loader(), make_loader(seed=2), ckpt_path=path)
    assert not [entry for entry in recwarn if "takes for done" in str(entry.message)]
