"""A training's model as it was at the end of a round, to go back to."""

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lrp_prune.callbacks._averages import averaged_models
from lrp_prune.callbacks._callbacks import callbacks_of
from lrp_prune.callbacks._corrected import uncorrected
from lrp_prune.callbacks._state import PruningState
from lrp_prune.callbacks.relevance_pruning import RelevancePruning
from lrp_prune.pruning.sparse_adapters import unmask_adapters


def prunings_of(trainer: Trainer) -> list[RelevancePruning]:
    """The pruning callbacks of a training."""
    return [entry for entry in callbacks_of(trainer) if isinstance(entry, RelevancePruning)]


class EndOfRound:
    """Weights, buffers and averages of weights, in the memory of the CPU, and what each pruning callback had done.

    Args:
        tensors: of the module and of each average, by name.
        states: of the pruning callbacks, in their order.
    """

    def __init__(self, tensors: list[dict[str, Tensor]], states: list[PruningState]) -> None:
        self._tensors, self._states = tensors, states

    @classmethod
    def of(cls, trainer: Trainer, pl_module: LightningModule) -> "EndOfRound":
        """As it is now; what is pending does not count."""
        states = []
        for pruning in prunings_of(trainer):
            state = copy(pruning._pruner.state)
            state.pending = None
            states.append(state)
        with uncorrected(pl_module):
            tensors = [
                {name: entry.detach().to("cpu", copy=True) for name, entry in _tensors(module).items()}
                for module in (pl_module, *averaged_models(trainer))
            ]
        return cls(tensors, states)

    def go_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put everything back, bit for bit, and let the masks of then take effect."""
        with uncorrected(pl_module):
            unmask_adapters(pl_module)  # of all callbacks, each of which masks its own again
            for pruning, state in zip(prunings_of(trainer), self._states, strict=True):
                pruning._pruner.go_back(pl_module, copy(state))
            with torch.no_grad():
                for module, values in zip((pl_module, *averaged_models(trainer)), self._tensors, strict=True):
                    for name, entry in _tensors(module).items():
                        entry.copy_(values[name])

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain values, for a checkpoint."""
        return {"tensors": self._tensors, "states": [state.to_dict({}) for state in self._states]}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "EndOfRound":
        """What :meth:`to_dict` gave."""
        return cls(list(state["tensors"]), [PruningState.from_dict(entry, {}) for entry in state["states"]])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
