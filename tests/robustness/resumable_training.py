"""A training that resumes bit for bit by itself, so that whatever a callback adds to a resume can be seen.

Lightning stores neither the random state nor accumulated gradients, and a loader's position only if the loader has one:
random numbers are seeded for each batch, checkpoints are written after optimizer steps, and the loader is stateful.
"""

import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lrp_prune.callbacks import RelevancePruning

MODES = ("one", "ddp", "fsdp-full", "fsdp-sharded")
EPOCHS, ROUNDS = 4, 3
SAMPLES, BATCH_SIZE = 48, 4


class Loader:
    """Batches of this process's part of made-up samples; knows where it is."""

    def __init__(self, seed: int, samples: int = SAMPLES, batch_size: int = BATCH_SIZE) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(samples, 8, generator=generator)
        self.labels = (self.inputs[:, :4] + 0.5 * self.inputs[:, 4:]).argmax(dim=1)
        self.batch_size, self.position = batch_size, 0

    def __len__(self) -> int:
        return len(self.inputs) // (self.batch_size * _world_size())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.position >= len(self):
            self.position = 0
        while self.position < len(self):
            self.position += 1
            start = ((self.position - 1) * _world_size() + _rank()) * self.batch_size
            yield self.inputs[start : start + self.batch_size], self.labels[start : start + self.batch_size]
        self.position = 0


class StatefulLoader(Loader):
    """Goes on where it was."""

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Classifier(LightningModule):
    """An MLP with dropout; sharded layer by layer where the strategy has a mesh."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Linear(8, 24), nn.LayerNorm(24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 16), nn.ReLU()]
            self.net = nn.Sequential(*layers, nn.Linear(16, 4))

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is not None and not hasattr(self.net, "set_requires_gradient_sync"):
            from torch.distributed.fsdp import fully_shard

            for layer in (self.net[0], self.net[4]):
                fully_shard(layer, mesh=mesh["data_parallel"])
            fully_shard(self.net, mesh=mesh["data_parallel"])

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 64)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Reseed(Callback):
    """Random numbers that depend on the place in the training only."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(1000 * trainer.current_epoch + 10 * batch_idx + trainer.global_rank)


class Diary(Callback):
    """Writes down, line by line and at once, what begins when, for whoever wants to kill this process in it."""

    def __init__(self, file: int | None) -> None:
        self._file = file

    def note(self, event: str) -> None:
        if self._file is not None:
            os.write(self._file, f"{event} {time.monotonic():.6f}\n".encode())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        inside = batch_idx % trainer.accumulate_grad_batches
        self.note("window" if inside else "batch")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("validation")


class Telling(RelevancePruning):
    """Tells the diary when a round collects and when it prunes."""

    diary: Diary | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if self._collection.active and self.diary is not None:
            self.diary.note("collecting")

    def _prune(self, trainer: Trainer, pl_module: LightningModule, log: bool) -> None:
        if self.diary is not None:
            self.diary.note("pruning")
        super()._prune(trainer, pl_module, log)

    @property
    def state_key(self) -> str:
        return super().state_key.replace("Telling", "RelevancePruning")


class Found(Callback):
    """What the pruning callback has after a resume, before anything is trained."""

    def __init__(self, path: Path, pruning: RelevancePruning) -> None:
        self._path, self._pruning = path, pruning

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        masks = self._pruning.masks
        if masks is not None and getattr(masks, "shardings", None):
            return  # each process has a part
        zeros = {name: _whole(pl_module.get_parameter(name)) != 0 for name in masks} if masks is not None else {}
        agree = masks is not None and all(bool((zeros[name] <= masks[name]).all()) for name in masks)
        if trainer.is_global_zero:
            found = {
                "round": self._pruning.round,
                "masks": masks.checksum() if masks is not None else "",
                "zeros": agree,
            }
            torch.save(found, self._path)


class SavedMasks(Callback):
    """The masks of processes that give nothing back; here, since spawned processes import what they unpickle."""

    def __init__(self, path: Path, pruning: RelevancePruning) -> None:
        self._path, self._pruning = path, pruning

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._pruning.masks is not None
        torch.save((self._pruning.round, self._pruning.masks.checksum()), self._path / f"masks.{trainer.global_rank}")


class TellingCheckpoint(ModelCheckpoint):
    """Tells the diary when a file is written."""

    diary: Diary

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self.diary.note("checkpoint")
        super()._save_checkpoint(trainer, filepath)
        self.diary.note("batch")


def train(
    directory: Path,
    mode: str = "one",
    pruning: dict[str, Any] | None = None,
    resume: Path | None = None,
    accumulate: int = 2,
    diary: int | None = None,
    max_epochs: int = EPOCHS,
    **arguments: Any,
) -> None:
    """Train, and write what came out of it into ``directory``.

    Args:
        directory: of the checkpoints; of ``result.pt``: weights, optimizer state, masks and round; and of ``found.pt``:
            masks and round right after a resume.
        mode: one of ``MODES``; the number of processes is the environment's.
        pruning: arguments of the callback; None: without it.
        resume: the checkpoint to go on from.
        accumulate: batches in a window.
        diary: file descriptor that the diary is written to.
        max_epochs: of the trainer.
        **arguments: further ones of the trainer.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*(many workers|does not have|deprecated|exists and is not empty).*")
    directory.mkdir(parents=True, exist_ok=True)
    notes = Diary(diary)
    files = TellingCheckpoint(directory / "checkpoints", "{epoch}-{step}", save_top_k=-1, every_n_train_steps=1)
    ends = TellingCheckpoint(directory / "checkpoints", "{epoch}-{step}-end", save_top_k=-1, every_n_epochs=1)
    files.diary = ends.diary = notes
    callbacks: list[Any] = [notes, Reseed(), files, ends]
    callback = None
    if pruning is not None:
        callback = Telling(**{"sparsity": 0.7, "rounds": ROUNDS, "scope": "global", "summary": False, **pruning})
        callback.diary = notes
        callbacks += [callback, Found(directory / "found.pt", callback)]
    trainer = Trainer(
        accelerator="cpu",
        strategy=_strategy(mode),
        devices=_world_size(),
        max_epochs=max_epochs,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=None if mode.startswith("fsdp") else 0.5,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **arguments,
    )
    module = Classifier()
    trainer.fit(module, StatefulLoader(1), Loader(2), ckpt_path=resume)
    weights = {name: _whole(parameter) for name, parameter in module.state_dict().items()}
    moments = [
        _whole(value)
        for state in trainer.optimizers[0].state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    done = {"weights": weights, "moments": moments, "steps": trainer.global_step}
    if callback is not None:
        assert callback.masks is not None
        done |= {"masks": callback.masks.state_dict()["bits"], "round": callback.round}
    if _rank() == 0:
        torch.save(done, directory / "result.pt")
    notes.note("end")


def _strategy(mode: str) -> Any:
    if mode.startswith("fsdp"):
        from lightning.pytorch.strategies import ModelParallelStrategy

        return ModelParallelStrategy(
            data_parallel_size=_world_size(), tensor_parallel_size=1, save_distributed_checkpoint=mode == "fsdp-sharded"
        )
    return "auto" if mode == "one" else "ddp"


def _whole(value: Tensor) -> Tensor:
    value = value.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


def _rank() -> int:
    started = torch.distributed.is_initialized()
    return torch.distributed.get_rank() if started else int(os.environ.get("RANK", "0"))


def _world_size() -> int:
    started = torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1"))
