"""Trainings that are cut off after an epoch, and go on from the checkpoint of then."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint


def check_resumed_equals_whole(
    make_trainer: Any,
    make_module: Callable[[], LightningModule],
    make_callbacks: Callable[[], list[Callback]],
    loaders: Callable[[], tuple[Any, Any]],
    same_weights: Callable[[Any, Any], bool],
    folder: Path,
) -> None:
    """Five epochs give the same weights, bit for bit, as going on from the checkpoint of any of the first four."""

    def run(path: Path | None = None) -> LightningModule:
        checkpoint = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}")
        module = make_module()
        trainer = make_trainer(callbacks=[*make_callbacks(), checkpoint], max_epochs=5, enable_checkpointing=True)
        trainer.fit(module, *loaders(), ckpt_path=path)
        return module

    whole = run()
    paths = sorted(folder.glob("*.ckpt"))[:4]
    assert len(paths) == 4
    for path in paths:
        assert same_weights(whole, run(path)), path
