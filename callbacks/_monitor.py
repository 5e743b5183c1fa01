"""A metric that counts only once the model has its final sparsity."""

from collections.abc import Collection
from difflib import get_close_matches

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lrp_prune.callbacks._callbacks import callbacks_of
from lrp_prune.wrapper.internals import has_validated

_OF_LOADER = "/dataloader_idx_"
_WORST = 3e38


class Monitored:
    """Logs ``<name>/<metric>`` for ``ModelCheckpoint`` and ``EarlyStopping`` to monitor.

    With the final sparsity it is the metric, as far as it was measured since. Before, it is a huge number that gets a little
    better at each validation, so that any value at the final sparsity is better, and patience does not run out while the rounds
    go on. It is no figure to look at and is not sent to the logger.

    Args:
        metric: name of a metric that the module logs in validation; None: there is nothing to do.
        mode: ``"min"`` if smaller is better, or ``"max"``.
        name: of the callback.
    """

    def __init__(self, metric: str | None, mode: str, name: str) -> None:
        self.metric, self._mode, self._key = metric, mode, f"{name}/{metric}"
        self._before: Tensor | None = None
        self._late = self._told = False

    def check(self, trainer: Trainer) -> None:
        """Refuse a trainer that logs nothing, and a callback that takes for better what this takes for worse.

        Raises:
            MisconfigurationException: names it.
        """
        check_logs(trainer, "RelevancePruning", self.metric)
        for callback in callbacks_of(trainer) if self.metric is not None else ():
            mode = getattr(callback, "mode", None)
            if getattr(callback, "monitor", None) == self._key and mode in ("min", "max") and mode != self._mode:
                raise MisconfigurationException(
                    f"{type(callback).__name__}(monitor={self._key!r}, mode={mode!r}) and RelevancePruning(monitor="
                    f"{self.metric!r}, monitor_mode={self._mode!r}) do not agree on what is better: set both to 'min' if smaller "
                    "values are (a loss), or to 'max' (an accuracy)"
                )

    def forget(self, trainer: Trainer) -> None:
        """From now on, what was measured before does not count: the model, or the validation, is another one."""
        if self.metric is not None:
            # Lightning keeps it until another is logged, as the same object.
            self._before = trainer.callback_metrics.get(self.metric)

    def log(self, trainer: Trainer, pl_module: LightningModule, final: bool) -> None:
        """Log it at the end of an epoch.

        Args:
            trainer: whose metrics hold the module's.
            pl_module: logs.
            final: whether all rounds are done.
        """
        if self.metric is None:
            return
        value = self._measured(trainer)
        self._late = value is None
        if not final:
            worst = _WORST / (1 + trainer.global_step)
            value = torch.tensor(worst if self._mode == "min" else -worst, device=pl_module.device)
        if value is not None and _OF_LOADER in self._key:  # which Lightning adds itself, and does not take
            trainer.callback_metrics[self._key] = value
        elif value is not None:
            pl_module.log(self._key, value, on_step=False, on_epoch=True, logger=False, sync_dist=False, batch_size=1)

    def catch_up(self, trainer: Trainer, callback: Callback, final: bool) -> None:
        """Take over what the module logged in its own ``on_validation_epoch_end``, which comes after those of callbacks.

        To be called in ``on_validation_end``, in which ``ModelCheckpoint``, which is always last, looks at it.

        Args:
            trainer: the training.
            callback: whose hook this is; others that monitor it have to come after.
            final: whether all rounds are done.
        """
        value = self._measured(trainer)
        if not self._late or value is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if final:
            trainer.callback_metrics[self._key] = value
        others = callbacks_of(trainer)
        for other in others[: others.index(callback)]:
            if getattr(other, "monitor", None) == self._key and not self._told:
                self._told = True
                rank_zero_warn(
                    f"{type(other).__name__}(monitor={self._key!r}) gets each value one validation late, as {self.metric!r} is "
                    "logged at a validation's end only: put it after RelevancePruning in the trainer's callbacks, or log "
                    f"{self.metric!r} in validation_step"
                )

    def _measured(self, trainer: Trainer) -> Tensor | None:
        found = trainer.callback_metrics.get(self.metric) if self.metric is not None else None
        return None if found is self._before else found


def check_sanity(metric: str | None, logged: Collection[str]) -> None:
    """Tell after the sanity check of a metric to monitor that it did not log: refuse what looks misspelt, and warn of the rest.

    A module may leave out a metric in the sanity check, so that its absence alone proves nothing.

    Args:
        metric: the one to monitor; None: there is none.
        logged: the names that the sanity check logged; empty if there was none.

    Raises:
        MisconfigurationException: another name is nearly the same.
    """
    if metric is None or not logged or metric in logged:
        return
    message = f"monitor={metric!r} is not logged in the sanity check, which logs {', '.join(sorted(logged))}"
    meant = get_close_matches(metric, logged, n=1)
    if meant:
        raise MisconfigurationException(f"{message}: is {meant[0]!r} meant?")
    rank_zero_warn(f"{message}: log it by self.log({metric!r}, ...) in validation_step")


def check_logs(trainer: Trainer, callback: str, metric: str | None) -> None:
    """Refuse to follow a metric where nothing is logged.

    Raises:
        MisconfigurationException: the trainer is bare.
    """
    if metric is not None and trainer.barebones:
        raise MisconfigurationException(
            f"{callback}(monitor={metric!r}) follows a metric, and Trainer(barebones=True) logs none: leave out one of the two"
        )


def check_logged(trainer: Trainer, metric: str | None, names: Collection[str]) -> None:
    """Refuse a metric to monitor that the module does not log.

    Args:
        trainer: at the end of an epoch.
        metric: the one to monitor; None: there is none.
        names: of the pruning callbacks, whose own metrics are none of the module's.
    """
    if metric is not None and has_validated(trainer) and metric not in trainer.callback_metrics:
        logged = [name for name in sorted(trainer.callback_metrics) if name.partition("/")[0] not in names]
        raise MisconfigurationException(
            f"monitor={metric!r} is not logged in validation, which logs {', '.join(logged) or 'nothing'}: log it by "
            f"self.log({metric!r}, ...) in validation_step"
        )
