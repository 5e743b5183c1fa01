"""The averaged copies of a model that Lightning's callbacks hold."""

from collections.abc import Iterator

from lightning.pytorch import Trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel


def averaged_models(trainer: Trainer) -> Iterator[nn.Module]:
    """The averages kept by ``WeightAveraging`` and ``StochasticWeightAveraging``.

    They remember weights from before a pruning, and would bring them back in validation, in checkpoints and at the end.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's callback connector
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel):
            yield average.module
        elif isinstance(average, nn.Module):
            yield average
