"""What of Lightning has no public name: all of it that is used, here and by the callbacks, in one place.

Tested with lightning 2.5 to 2.6. ``pyproject.toml`` allows these versions and no others.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.optim.swa_utils import AveragedModel

DEVICE_MIXIN = "_DeviceDtypeModuleMixin"
"""The class that a LightningModule knows its device and type of values by."""
DEVICE_STATE = frozenset({"_device", "_dtype"})
"""What that class keeps in a module."""


def set_metric_names(module: LightningModule, names: dict[int, str]) -> None:
    """Say what metrics are called, by their ``id``, where another module than the trainer's has them."""
    module._metric_attributes = names


def averages_of(callbacks: Iterable[Callback]) -> Iterator[nn.Module]:
    """The averaged copies of the model that ``WeightAveraging`` and ``StochasticWeightAveraging`` hold."""
    for callback in callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel):
            yield average.module
        elif isinstance(average, nn.Module):
            yield average


def swaps_of(callbacks: Iterable[Callback]) -> list[Callable[[LightningModule], None]]:
    """What puts the averages of ``WeightAveraging`` in the place of a module's weights, and back."""
    return [
        callback._swap_models
        for callback in callbacks
        if hasattr(callback, "_swap_models") and getattr(callback, "_average_model", None) is not None
    ]


def starts_processes(trainer: Trainer) -> bool:
    """Whether the run is in processes that the trainer starts by itself, and that give back weights only."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def has_validated(trainer: Trainer) -> bool:
    """Whether the epoch at hand had a validation."""
    return bool(trainer.fit_loop.epoch_loop.val_loop._has_run)


def validation_loaders(trainer: Trainer) -> CombinedLoader | None:
    """The validation's loaders, however they were given; None before they are set up."""
    loop = trainer.validate_loop if trainer.state.fn == "validate" else trainer.fit_loop.epoch_loop.val_loop
    return loop._combined_loader


def mode_of(loaders: CombinedLoader) -> str:
    """How loaders are gone through: ``"sequential"`` is one after the other, all others side by side."""
    return loaders._mode


def to_device(batch: Any, trainer: Trainer, pl_module: LightningModule, dataloader_idx: int) -> Any:
    """What Lightning's own loops do to a batch before a step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=dataloader_idx)
