"""The callback that lets learning rates begin anew after each round of pruning."""

from copy import deepcopy
from typing import Any

from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lrp_prune.callbacks.relevance_pruning import RelevancePruning


class LearningRateRewinding(Callback):
    """Rewinds schedulers, and the learning rates they have set, to the start of the training after each round of pruning.

    A schedule that has come down hardly trains what a later round has pruned. Here each round gets the schedule from its
    beginning (learning-rate rewinding, arXiv 2003.02389; weights are not rewound): make it as long as the time between rounds.
    Everything in an optimizer's groups that a scheduler may change is rewound (learning rates, momentum); moments and weights
    stay. The state is in the checkpoint, so that a resumed training equals the uninterrupted one.

    Example::

        from lrp_prune.callbacks import LearningRateRewinding, RelevancePruning, Rounds

        Trainer(callbacks=[RelevancePruning(0.9, Rounds(4, every_n_epochs=5)), LearningRateRewinding()])

    Raises:
        MisconfigurationException: in ``fit``, if the trainer has no :class:`RelevancePruning` before it in its list of callbacks;
            after a round, if an optimizer has been given further groups of parameters.
    """

    def __init__(self) -> None:
        self._schedulers: list[dict[str, Any]] | None = None
        self._groups: list[list[dict[str, Any]]] = []
        self._rounds = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        callbacks: list[Any] = list(getattr(trainer, "callbacks", []))
        own = callbacks.index(self)
        if not any(isinstance(entry, RelevancePruning) for entry in callbacks[:own]):
            raise MisconfigurationException(
                "LearningRateRewinding rewinds after the rounds of a RelevancePruning, and there is none before it in the "
                "trainer's callbacks: add one, before it"
            )
        self._schedulers, self._groups, self._rounds = None, [], 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.lr_scheduler_configs:
            rank_zero_warn(
                "there is no learning rate scheduler, so that LearningRateRewinding has nothing to rewind: return one from "
                "configure_optimizers, or leave the callback out"
            )
        if self._schedulers is None:
            self._schedulers = [deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
            self._groups = [
                [
                    {name: deepcopy(value) for name, value in group.items() if name != "params"}
                    for group in optimizer.param_groups
                ]
                for optimizer in trainer.optimizers
            ]
            self._rounds = _rounds_of(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        done = _rounds_of(trainer)
        if done == self._rounds or self._schedulers is None:
            return
        self._rounds = done
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            if len(optimizer.param_groups) != len(groups):
                raise MisconfigurationException(
                    f"an optimizer has {len(optimizer.param_groups)} groups of parameters and had {len(groups)} at the start of "
                    "the training, so that there is nothing to rewind the others to: leave LearningRateRewinding out"
                )
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update(deepcopy(values))
        for config, state in zip(trainer.lr_scheduler_configs, self._schedulers, strict=True):
            config.scheduler.load_state_dict(deepcopy(state))
        if self._schedulers:
            rank_zero_info(f"round {done}: learning rates begin anew")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"schedulers": self._schedulers, "groups": self._groups, "rounds": self._rounds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._schedulers, self._groups = state_dict["schedulers"], state_dict["groups"]
        self._rounds = state_dict["rounds"]


def _rounds_of(trainer: Trainer) -> int:
    """Rounds that were pruned, of all callbacks that do."""
    callbacks: list[Any] = list(getattr(trainer, "callbacks", []))
    return sum(entry.round for entry in callbacks if isinstance(entry, RelevancePruning))
