"""The averaged copies of a model that Lightning's callbacks hold."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lrp_prune.callbacks._callbacks import callbacks_of
from lrp_prune.wrapper.internals import averages_of, swaps_of


def averaged_models(trainer: Trainer) -> Iterator[nn.Module]:
    """The averages kept by ``WeightAveraging`` and ``StochasticWeightAveraging``.

    They remember weights from before a pruning, and would bring them back in validation, in checkpoints and at the end.
    """
    return averages_of(callbacks_of(trainer))


@contextmanager
def trained_weights(trainer: Trainer, pl_module: LightningModule, callback: Callback | None = None) -> Iterator[None]:
    """The weights that are trained, where ``WeightAveraging`` has put its average in their place for a validation.

    It does so between ``on_validation_epoch_start`` and its own ``on_validation_epoch_end`` of each validation in ``fit``.
    What is pruned are the trained weights, so it is their relevance that counts.

    Args:
        trainer: the run.
        pl_module: its module.
        callback: who asks in ``on_validation_epoch_end``: those before it in the trainer's list have put back what they
            replaced. ``None`` where all have replaced it, between those hooks.
    """
    callbacks = callbacks_of(trainer)
    later = callbacks if callback is None else callbacks[callbacks.index(callback) + 1 :]
    swapping = swaps_of(later)
    for swap in reversed(swapping):
        swap(pl_module)
    try:
        yield
    finally:
        for swap in swapping:
            swap(pl_module)
