"""How a callback runs a module by itself: in the precision of a validation step, and with nothing logged."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from torch import nn

from lrp_prune.models.states import unlogged


@contextmanager
def own_forward(trainer: Trainer, module: nn.Module) -> Iterator[None]:
    """Around forwards that are no step of the module's: what logs in a hook of the model that it holds is silent as well.

    Args:
        trainer: the run.
        module: its module, or what of it is run.
    """
    with trainer.precision_plugin.val_step_context(), unlogged(module):
        yield
