"""When each round collects and prunes, and whether all rounds fit into a training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lrp_prune.callbacks._callbacks import callbacks_of
from lrp_prune.callbacks._checks import check_count, checked_rounds
from lrp_prune.pruning import Schedule


@dataclass(frozen=True)
class Rounds:
    """How many rounds there are, and when; a number stands for as many of them, one an epoch from epoch 1 on.

    Args:
        count: number of rounds; None: one for each number of the schedule if that is a list, else one.
        every_n_epochs: epochs between rounds; 1 if neither this nor ``every_n_steps`` is given.
        every_n_steps: optimizer steps (``trainer.global_step``) between rounds, instead of epochs.
        start: the epoch at whose start the first round prunes, or the step from which it is due; ``None`` for epoch 1, or
            ``every_n_steps``. Epoch 0 needs reference data, or a method without data.

    Raises:
        MisconfigurationException: an argument has an impossible value, or does not fit another.

    Example::

        RelevancePruning(sparsity=0.7, rounds=Rounds(5, every_n_steps=500))
    """

    count: int | None = None
    every_n_epochs: int | None = None
    every_n_steps: int | None = None
    start: int | None = None

    def __post_init__(self) -> None:
        check_count("rounds", self.count, 1, optional=True)
        check_count("every_n_epochs", self.every_n_epochs, 1, optional=True)
        check_count("every_n_steps", self.every_n_steps, 1, optional=True)
        check_count("start", self.start, 0, optional=True)
        if self.every_n_steps is not None and self.every_n_epochs is not None:
            raise MisconfigurationException(
                f"every_n_epochs={self.every_n_epochs} and every_n_steps={self.every_n_steps} exclude each other: pass one "
                "of them"
            )

    def times(self, schedule: Schedule, uses_validation: bool) -> "Times":
        """When the rounds of a schedule are, in a training whose validations they need or not.

        Raises:
            MisconfigurationException: nothing says how many there are, or the first would come before any validation.
        """
        count = checked_rounds(schedule, self.count)
        if self.every_n_steps is not None:
            first = self.every_n_steps if self.start is None else self.start
            return Times(count, self.every_n_steps, first, by_steps=True)
        first = 1 if self.start is None else self.start
        if first == 0 and uses_validation:
            raise MisconfigurationException(
                "start=0 prunes before there was a validation to collect relevance in: pass reference= with batches, or start=1"
            )
        return Times(count, self.every_n_epochs or 1, first, by_steps=False)


@dataclass(frozen=True)
class Times:
    """The times of the rounds 0, 1, ..., ``count - 1``, by epochs or by optimizer steps.

    By epochs, round ``r`` prunes at the start of epoch ``start + r * every`` with what the last validation before it
    collected. By steps, it becomes due at step ``start + r * every``: the first validation from then on collects, and
    the next training batch begins with the pruning; without a validation, the pruning is at that step.

    Args:
        count: number of rounds.
        every: epochs or optimizer steps (``trainer.global_step``) between rounds.
        start: the epoch or step of the first.
        by_steps: which of the two.
    """

    count: int
    every: int
    start: int
    by_steps: bool

    def time_of(self, index: int) -> int:
        """The epoch or the step of a round."""
        return self.start + index * self.every

    def delayed(self, delay: int) -> "Times":
        """The same rounds, all later by so many epochs or steps."""
        return replace(self, start=self.start + delay)

    def missed(self, trainer: Trainer, uses_validation: bool) -> int:
        """By how much the first round's time has passed in a training that has begun without pruning; else 0."""
        first = trainer.global_step if self.by_steps else trainer.current_epoch + uses_validation
        return max(0, first - self.start)

    def is_due(self, trainer: Trainer, index: int) -> bool:
        """Whether the round may prune at the start of this epoch or batch."""
        now = trainer.global_step if self.by_steps else trainer.current_epoch
        return index < self.count and now >= self.time_of(index)

    def needs_validation(self, trainer: Trainer, index: int, epoch: int | None = None) -> bool:
        """Whether the validation that begins is one that the round collects in.

        If an epoch has several validations, only its last one is, where that is known beforehand; else each is, and a
        later one replaces what an earlier one gave.

        Args:
            trainer: the training, with its counters after the batch before the validation.
            index: the round.
            epoch: of the validation; the current one by default.
        """
        if index >= self.count:
            return False
        if self.by_steps:
            return trainer.global_step >= self.time_of(index)
        interval = trainer.check_val_every_n_epoch
        if (trainer.current_epoch if epoch is None else epoch) + (interval or 1) < self.time_of(index):
            return False
        batches, between = trainer.num_training_batches, trainer.val_check_batch
        if between is None or math.isinf(between) or math.isinf(batches):
            return True
        if interval is None:
            done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
            return done + between > self.time_of(index) * batches
        done = trainer.fit_loop.epoch_loop.batch_idx + 1
        return done + between > batches

    def check_fit(self, trainer: Trainer, done: int, uses_validation: bool) -> None:
        """Refuse a training in which the remaining rounds cannot all happen.

        Args:
            trainer: the training, as it is at its start.
            done: rounds that were pruned, or collected for, before.
            uses_validation: whether a round needs a validation before it.

        Raises:
            MisconfigurationException: a round comes too late, or has no validation; the message says what would do.
        """
        if done >= self.count or getattr(trainer, "fast_dev_run", False):
            return
        self.check_validations(trainer, uses_validation)
        if self.by_steps:
            self._check_steps(trainer, done, uses_validation)
        else:
            self._check_epochs(trainer, done, uses_validation)

    def check_validations(self, trainer: Trainer, uses_validation: bool) -> None:
        """Refuse a training without the validations that a round needs."""
        if uses_validation and not trainer.enable_validation:
            raise MisconfigurationException(
                "relevance is collected in validations, but this training has none: give it a validation loader and a "
                "validation_step (and limit_val_batches > 0), or pass reference= with batches to the callback"
            )

    def _check_epochs(self, trainer: Trainer, done: int, uses_validation: bool) -> None:
        available, limit = _epochs_of(trainer)
        needed = self.time_of(self.count - 1) + 1
        if trainer.max_steps >= 0 and not trainer.lightning_module.automatic_optimization:
            rank_zero_warn(
                f"{self.count} rounds need {needed} epochs; how many fit into max_steps={trainer.max_steps} is up to the module, "
                "which steps its optimizers itself (each step of each of them counts): set Trainer(max_epochs=...) instead to be "
                "sure"
            )
        if needed > available:
            raise MisconfigurationException(
                f"{self.count} rounds, one every {self.every} epochs from epoch {self.start} on, need {needed} epochs, "
                f"but the training ends after {available:g} ({limit}): {_remedy(trainer, limit, needed)}, or use fewer "
                f"rounds, a smaller every_n_epochs, or every_n_steps"
            )
        interval = trainer.check_val_every_n_epoch
        if not uses_validation or interval is None:
            return
        for index in range(done, self.count):
            begin = max(self.time_of(index - 1), 0) if index else 0
            end = self.time_of(index)
            if not end // interval * interval > begin:
                raise MisconfigurationException(
                    f"round {index + 1} prunes at the start of epoch {end}, but no validation lies between epoch "
                    f"{begin} and it with check_val_every_n_epoch={interval}: set every_n_epochs to a multiple of "
                    f"{interval} (and start likewise), or validate more often"
                )

    def _check_steps(self, trainer: Trainer, done: int, uses_validation: bool) -> None:
        if not trainer.lightning_module.automatic_optimization:
            return  # how often the module will step is its own affair
        total, batches = _steps_in(trainer), trainer.num_training_batches
        needed = self.time_of(self.count - 1) + 1
        placed = done
        if uses_validation and not math.isinf(total):
            for step in _validation_steps(trainer, int(total)):
                if placed < self.count and step >= self.time_of(placed):
                    placed += 1
        else:
            placed += sum(self.time_of(index) < total for index in range(done, self.count))
        if placed < self.count:
            validations = (
                ", with a validation after each of them that leaves steps to train," if uses_validation else ""
            )
            if math.isinf(batches):
                remedy = "a larger max_steps is needed"
            else:
                epochs = _epochs_within(trainer, needed, math.inf) + (1 if uses_validation else 0)
                each = "" if len(_accumulated(trainer)) > 1 else f" of {_steps_of(trainer, 0)} steps"
                remedy = f"about {epochs} epochs{each} are needed"
            raise MisconfigurationException(
                f"{self.count} rounds, one every {self.every} steps from step {self.start} on, need {needed} optimizer "
                f"steps{validations} but only {placed} of them fit into the {total:g} steps of this training: "
                f"{remedy}, or fewer rounds, a smaller every_n_steps, or a smaller val_check_interval"
            )


def _epochs_of(trainer: Trainer) -> tuple[float, str]:
    """How many epochs begin, and by which limit."""
    epochs: float = math.inf
    limit = "no limit"
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        epochs, limit = trainer.max_epochs, f"max_epochs={trainer.max_epochs}"
    if trainer.max_steps >= 0 and _steps_known(trainer):
        by_steps = _epochs_within(trainer, trainer.max_steps, epochs)
        if by_steps < epochs:
            epochs, limit = by_steps, f"max_steps={trainer.max_steps}"
    return epochs, limit


def _steps_known(trainer: Trainer) -> bool:
    """Whether it is the trainer that decides when an optimizer steps, in epochs of known length."""
    return trainer.lightning_module.automatic_optimization and not math.isinf(trainer.num_training_batches)


def _epochs_within(trainer: Trainer, steps: int, most: float) -> int:
    """How many epochs begin within so many steps, each of as many as gradients are accumulated in it."""
    done = epoch = 0
    while done < steps and epoch < most:
        done += _steps_of(trainer, epoch)
        epoch += 1
    return epoch


def _steps_in(trainer: Trainer) -> float:
    """How many steps a training takes; infinity where epochs of unknown length are the only limit."""
    total: float = trainer.estimated_stepping_batches
    if math.isinf(trainer.num_training_batches) or trainer.max_epochs is None or trainer.max_epochs < 0:
        return math.inf if total < 0 else total
    # Lightning's estimate takes gradients to be accumulated over as many batches in each epoch.
    steps = sum(_steps_of(trainer, epoch) for epoch in range(max(trainer.max_epochs, 1)))
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)


def _accumulated(trainer: Trainer) -> dict[int, int]:
    """Over how many batches gradients are accumulated, by the epoch from which on that is so."""
    for entry in callbacks_of(trainer):
        if isinstance(entry, GradientAccumulationScheduler):
            return dict(entry.scheduling)
    return {0: trainer.accumulate_grad_batches}


def _accumulated_in(trainer: Trainer, epoch: int) -> int:
    known = _accumulated(trainer)
    return known[max(first for first in known if first <= epoch)]


def _steps_of(trainer: Trainer, epoch: int) -> int:
    return max(1, math.ceil(trainer.num_training_batches / _accumulated_in(trainer, epoch)))


def _remedy(trainer: Trainer, limit: str, needed: int) -> str:
    if limit.startswith("max_epochs"):
        return f"set Trainer(max_epochs={needed})"
    return f"set Trainer(max_steps={sum(_steps_of(trainer, epoch) for epoch in range(needed - 1)) + 1}) or more"


def warn_of_no_epoch(trainer: Trainer, name: str, every_n_epochs: int, what: str) -> None:
    """Warn, in ``on_train_start``, where no epoch that is one of every so many ends, with a validation, in this training.

    Args:
        trainer: the training.
        name: of the callback.
        every_n_epochs: how often it works.
        what: it does not do then.
    """
    epochs, limit = _epochs_of(trainer)
    interval = trainer.check_val_every_n_epoch or 1
    first = math.lcm(every_n_epochs, interval)
    first *= trainer.current_epoch // first + 1
    if first > epochs and not getattr(trainer, "fast_dev_run", False):
        often = f" and check_val_every_n_epoch={interval}" if interval > 1 else ""
        rank_zero_warn(
            f"{name}(every_n_epochs={every_n_epochs}) {what} nothing in this training: with it{often} the first time is after "
            f"{first} epochs, and the training ends after {epochs:g} ({limit}): set a smaller every_n_epochs, or "
            f"Trainer(max_epochs={first})"
        )


def _validation_steps(trainer: Trainer, total: int) -> Sequence[int]:
    """Optimizer steps taken at each validation after which training goes on; those of unknown time are left out.

    Where nobody knows how long an epoch is, a validation may be after each step, unless they are so many batches apart.
    """
    batches, between = trainer.num_training_batches, trainer.val_check_batch
    if math.isinf(batches):
        apart = trainer.check_val_every_n_epoch is None and set(_accumulated(trainer).values()) == {1}
        if between is None or math.isinf(between) or not apart:
            return range(1, total)
        return range(int(between), total, int(between))
    interval = trainer.check_val_every_n_epoch
    if between is None or math.isinf(between):
        between, interval = batches, interval or 1
    between = int(between)
    steps = list[int]()
    done = 0
    for epoch in range(_epochs_within(trainer, total, math.inf)):
        offset = epoch * int(batches) if interval is None else 0
        first = between - offset % between
        for batch in range(first, int(batches) + 1, between) if (epoch + 1) % (interval or 1) == 0 else ():
            taken = _steps_of(trainer, epoch) if batch == batches else batch // _accumulated_in(trainer, epoch)
            if done + taken < total:
                steps.append(done + taken)
        done += _steps_of(trainer, epoch)
    return steps
