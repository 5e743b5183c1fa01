"""A metric that counts only once the model has its final sparsity."""

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

_WORST = 3e38


def log_guarded(trainer: Trainer, pl_module: LightningModule, metric: str, mode: str, final: bool, name: str) -> None:
    """Log ``<name>/<metric>`` for ``ModelCheckpoint`` and ``EarlyStopping`` to monitor.

    With the final sparsity it is the metric. Before, it is a huge number that gets a little better at each validation,
    so that any value at the final sparsity is better, and patience does not run out while the rounds go on. It is no
    figure to look at and is not sent to the logger.

    Args:
        trainer: whose metrics hold ``metric``.
        pl_module: logs.
        metric: name of a metric that the module logs in its ``validation_step``.
        mode: ``"min"`` if smaller is better, or ``"max"``.
        final: whether all rounds are done.
        name: of the callback.
    """
    if final:
        value = trainer.callback_metrics.get(metric)
        if value is None:
            return
    else:
        worst = _WORST / (1 + trainer.global_step)
        value = torch.tensor(worst if mode == "min" else -worst, device=pl_module.device)
    pl_module.log(f"{name}/{metric}", value, on_step=False, on_epoch=True, logger=False, sync_dist=False)


def check_logged(trainer: Trainer, metric: str) -> None:
    """Refuse a guarded metric that the module does not log."""
    if trainer.fit_loop.epoch_loop.val_loop._has_run and metric not in trainer.callback_metrics:
        raise MisconfigurationException(
            f"guard={metric!r} is not logged in validation, which logs {sorted(trainer.callback_metrics)}: "
            f"log it by self.log({metric!r}, ...) in validation_step"
        )
