"""What callbacks are told of the rounds of pruning callbacks beside them."""

from lightning.pytorch import Callback, LightningModule, Trainer

from lrp_prune.callbacks._callbacks import callbacks_of
from lrp_prune.pruning import Masks


class RoundListener(Callback):
    """Is told of each round right before it prunes."""

    def before_round(self, trainer: Trainer, pl_module: LightningModule, masks: Masks, adjusts: bool) -> None:
        """The weights are still those from before the round.

        Args:
            trainer: the training.
            pl_module: its module.
            masks: which the round is going to apply.
            adjusts: whether it also changes what it keeps.
        """


def tell_before_round(trainer: Trainer, pl_module: LightningModule, masks: Masks, adjusts: bool) -> None:
    """Tell all who listen, wherever they are in the list of callbacks."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, RoundListener):
            callback.before_round(trainer, pl_module, masks, adjusts)
