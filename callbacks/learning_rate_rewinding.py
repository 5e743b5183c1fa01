"""The callback that lets learning rates begin anew after each round of pruning."""

from copy import deepcopy
from typing import Any

from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lrp_prune.callbacks._callbacks import callbacks_of, copied_state
from lrp_prune.callbacks.relevance_pruning import RelevancePruning

_SCHEDULED = ("lr", "momentum", "betas")
"""What schedulers change in an optimizer's groups; what else is there may be an optimizer's own count or estimate."""


class LearningRateRewinding(Callback):
    """Rewinds schedulers, and the learning rates they have set, to the start of the training after each round of pruning.

    A schedule that has come down hardly trains what a later round has pruned. Here each round gets the schedule from its
    beginning (learning-rate rewinding, arXiv 2003.02389; weights are not rewound): make it as long as the time between rounds.
    What schedulers set in their optimizer's groups is rewound (learning rates, momentum); moments and weights stay, and so does
    an optimizer without a scheduler. The state is in the checkpoint, so that a resumed training equals the uninterrupted one.

    Example::

        from lrp_prune.callbacks import LearningRateRewinding, RelevancePruning, Rounds

        Trainer(callbacks=[RelevancePruning(0.9, Rounds(4, every_n_epochs=5)), LearningRateRewinding()])

    Raises:
        MisconfigurationException: in ``fit``, if the trainer has no :class:`RelevancePruning`, or one after it in its list of
            callbacks; after a round, if a scheduler's optimizer has been given further groups of parameters.
    """

    def __init__(self) -> None:
        self._schedulers: list[dict[str, Any]] | None = None
        self._groups: list[list[dict[str, Any]]] = []
        self._rounds = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        callbacks = callbacks_of(trainer)
        own = callbacks.index(self)
        before, after = _prunings(callbacks[:own]), _prunings(callbacks[own:])
        if not before or after:
            raise MisconfigurationException(
                "LearningRateRewinding rewinds after the rounds of each RelevancePruning, and there is "
                f"{'one after it' if after else 'none before it'} in the trainer's callbacks: put them before it"
            )
        self._schedulers, self._groups, self._rounds = None, [], 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.lr_scheduler_configs:
            rank_zero_warn(
                "there is no learning rate scheduler, so that LearningRateRewinding has nothing to rewind: return one from "
                "configure_optimizers, or leave the callback out"
            )
        if self._schedulers is not None and len(self._schedulers) != len(trainer.lr_scheduler_configs):
            raise MisconfigurationException(
                f"the checkpoint is of a training with {len(self._schedulers)} schedulers, and this one has "
                f"{len(trainer.lr_scheduler_configs)}: LearningRateRewinding cannot tell what to rewind them to"
            )
        if self._schedulers is None:
            if trainer.ckpt_path and trainer.global_step > 0 and trainer.lr_scheduler_configs:
                rank_zero_warn(
                    "the checkpoint has no state of LearningRateRewinding, as the training began without it: learning rates are "
                    f"rewound to those of step {trainer.global_step}, where it goes on"
                )
            self._schedulers = [deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
            self._groups = [
                [{name: deepcopy(group[name]) for name in _SCHEDULED if name in group} for group in groups]
                for groups in _scheduled(trainer)
            ]
            self._rounds = _rounds_of(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        done = _rounds_of(trainer)
        if done == self._rounds or self._schedulers is None:
            return
        self._rounds = done
        for groups, known in zip(_scheduled(trainer), self._groups, strict=True):
            if len(groups) != len(known):
                raise MisconfigurationException(
                    f"an optimizer has {len(groups)} groups of parameters and had {len(known)} at the start of the training, so "
                    "that there is nothing to rewind the others to: leave LearningRateRewinding out"
                )
            for group, values in zip(groups, known, strict=True):
                group.update(deepcopy(values))
        for config, state in zip(trainer.lr_scheduler_configs, self._schedulers, strict=True):
            config.scheduler.load_state_dict(deepcopy(state))
        if self._schedulers:
            rank_zero_info(f"round {done}: learning rates begin anew")

    def __getstate__(self) -> dict[str, Any]:
        return copied_state(self)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"schedulers": self._schedulers, "groups": self._groups, "rounds": self._rounds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._schedulers, self._groups = state_dict["schedulers"], state_dict["groups"]
        self._rounds = state_dict["rounds"]


def _scheduled(trainer: Trainer) -> list[list[dict[str, Any]]]:
    """The groups of each scheduler's optimizer."""
    return [config.scheduler.optimizer.param_groups for config in trainer.lr_scheduler_configs]


def _prunings(callbacks: list[Callback]) -> list[RelevancePruning]:
    return [entry for entry in callbacks if isinstance(entry, RelevancePruning)]


def _rounds_of(trainer: Trainer) -> int:
    """Rounds that were pruned, of all callbacks that do."""
    return sum(entry.round for entry in _prunings(callbacks_of(trainer)))
