"""What all callbacks that collect in validations have in common."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from lrp_prune.callbacks import _resuming, _uneven
from lrp_prune.callbacks._averages import trained_weights
from lrp_prune.callbacks._callbacks import copied_state
from lrp_prune.models.batches import contained


def check_validation(trainer: Trainer, name: str, does: str, every_n_epochs: int = 1) -> None:
    """Refuse a training without validations for a callback that works in them alone; say where a resume leaves one out.

    Args:
        trainer: the training that begins.
        name: of the callback.
        does: what it does in them.
        every_n_epochs: in which it does so, the last of so many.

    Raises:
        MisconfigurationException: likewise.
    """
    if not trainer.enable_validation:
        raise MisconfigurationException(
            f"{name} {does} at the end of validations, but this training has none: give it a validation loader and a "
            "validation_step (and limit_val_batches > 0), or call trainer.validate afterwards"
        )
    _resuming.warn_of_skipped(trainer, f"{name} {does} at the end of a later one, if there is one", every_n_epochs)


class CollectingCallback(Callback, ABC):
    """Takes each validation batch, as it was before the step, and ends with the validation, always with the trained weights."""

    _validating = False
    _given: Any = None
    """The batch at hand as the loader gave it: a step may take entries out of it."""

    def __getstate__(self) -> dict[str, Any]:
        return copied_state(self)

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
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # A step that takes batches by itself has none yet.
        takes = is_param_in_hook_signature(pl_module.validation_step, "dataloader_iter", explicit=True)
        self._given = contained(batch) if self._uses_validation(trainer) and not takes else None

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
        batch, self._given = batch if self._given is None else self._given, None
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
        self._given = None
        self._abandon()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._abandon()
        left_out = stage == "validate" and not self._validating
        self._validating = False
        if left_out and self._uses_validation(trainer):
            _uneven.check_batches(trainer, pl_module)  # as the processes do that have batches
