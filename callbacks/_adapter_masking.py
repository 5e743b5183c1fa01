"""Adapters under the masks of a checkpoint, where a model is run and not trained."""

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lrp_prune.callbacks._pruner import Pruner


class AdapterMasking(Callback):
    """In ``trainer.validate``, ``test`` and ``predict`` a model is what it was in training, also where it has just been loaded.

    Masks of adapters are no tensors of the module, so that its state has none. In a training the pruner sees to them.
    """

    _pruner: Pruner

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._pruner.mask_adapters(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pruner.mask_adapters(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pruner.mask_adapters(pl_module)
