"""What callbacks are told of the rounds of pruning callbacks beside them, and asked about them."""

from lightning.pytorch import Callback, LightningModule, Trainer

from lrp_prune.callbacks._callbacks import callbacks_of
from lrp_prune.pruning import Masks


class RoundListener(Callback):
    """Is asked before each round, and told of it right before it prunes; by all processes, at the same time."""

    def allows_round(self, trainer: Trainer, pl_module: LightningModule, trains_on: bool) -> bool:
        """Whether a round may prune.

        Args:
            trainer: the training.
            pl_module: its module.
            trains_on: whether there is a training after it.
        """
        return True

    def before_round(self, trainer: Trainer, pl_module: LightningModule, masks: Masks, adjusts: bool) -> None:
        """The weights are still those from before the round.

        Args:
            trainer: the training.
            pl_module: its module.
            masks: which the round is going to apply.
            adjusts: whether it also changes what it keeps.
        """


def is_allowed(trainer: Trainer, pl_module: LightningModule, trains_on: bool) -> bool:
    """Whether all who listen allow a round."""
    return all([entry.allows_round(trainer, pl_module, trains_on) for entry in _listeners(trainer)])


def tell_before_round(trainer: Trainer, pl_module: LightningModule, masks: Masks, adjusts: bool) -> None:
    """Tell all who listen, wherever they are in the list of callbacks."""
    for entry in _listeners(trainer):
        entry.before_round(trainer, pl_module, masks, adjusts)


def _listeners(trainer: Trainer) -> list[RoundListener]:
    return [entry for entry in callbacks_of(trainer) if isinstance(entry, RoundListener)]
