"""What all callbacks that collect in validations have in common."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from lrp_prune.callbacks import _uneven
from lrp_prune.callbacks._averages import trained_weights


class CollectingCallback(Callback, ABC):
    """Takes each validation batch and ends with the validation, always with the trained weights in the module."""

    _validating = False

    @abstractmethod
    def _uses_validation(self, trainer: Trainer) -> bool:
        """Whether this run's validations are collected in, or some of them."""

    @abstractmethod
    def _remember(self, batch: Any, dataloader_idx: int) -> None:
        """Take a batch of the sanity check, to try on it what is to be done later."""

    @abstractmethod
    def _observe(self, batch: Any, dataloader_idx: int) -> None:
        """Take a batch of any other validation."""

    @abstractmethod
    def _end_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is done in ``on_validation_epoch_end``."""

    @abstractmethod
    def _abandon(self) -> None:
        """Forget what is under way."""

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._uses_validation(trainer):
            _uneven.check_before_training(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._uses_validation(trainer):
            _uneven.check_before_training(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._uses_validation(trainer) and trainer.state.fn == "validate":
            self._validating = True
            _uneven.check_batches(trainer, pl_module)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking:
            self._remember(batch, dataloader_idx)
            return
        with trained_weights(trainer, pl_module):
            self._observe(batch, dataloader_idx)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with trained_weights(trainer, pl_module, self):
            self._end_validation(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._abandon()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._abandon()
        left_out = stage == "validate" and not self._validating
        self._validating = False
        if left_out and self._uses_validation(trainer):
            _uneven.check_batches(trainer, pl_module)  # as the processes do that have batches
