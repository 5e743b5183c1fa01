"""A metric that counts only once the model has its final sparsity."""

from collections.abc import Collection
from difflib import get_close_matches

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lrp_prune.wrapper.internals import has_validated

_WORST = 3e38


def log_monitored(trainer: Trainer, pl_module: LightningModule, metric: str, mode: str, final: bool, name: str) -> None:
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


def check_sanity(metric: str, logged: Collection[str]) -> None:
    """Tell after the sanity check of a metric to monitor that it did not log: refuse what looks misspelt, and warn of the rest.

    A module may leave out a metric in the sanity check, so that its absence alone proves nothing.

    Args:
        metric: the one to monitor.
        logged: the names that the sanity check logged; empty if there was none.

    Raises:
        MisconfigurationException: another name is nearly the same.
    """
    if not logged or metric in logged:
        return
    message = f"monitor={metric!r} is not logged in the sanity check, which logs {', '.join(sorted(logged))}"
    meant = get_close_matches(metric, logged, n=1)
    if meant:
        raise MisconfigurationException(f"{message}: is {meant[0]!r} meant?")
    rank_zero_warn(f"{message}: log it by self.log({metric!r}, ...) in validation_step")


def check_logged(trainer: Trainer, metric: str, names: Collection[str]) -> None:
    """Refuse a metric to monitor that the module does not log.

    Args:
        trainer: at the end of an epoch.
        metric: the one to monitor.
        names: of the pruning callbacks, whose own metrics are none of the module's.
    """
    if has_validated(trainer) and metric not in trainer.callback_metrics:
        logged = [name for name in sorted(trainer.callback_metrics) if name.partition("/")[0] not in names]
        raise MisconfigurationException(
            f"monitor={metric!r} is not logged in validation, which logs {', '.join(logged) or 'nothing'}: log it by "
            f"self.log({metric!r}, ...) in validation_step"
        )
