"""Processes with different numbers of validation batches: what works is left alone, what would hang is refused by all."""

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lrp_prune.callbacks._distributed import agreeing, gathered


def check_before_training(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse, in ``on_train_start``, a training whose validations could not end together.

    Raises:
        MisconfigurationException: on all processes; see :func:`check_batches`.
    """
    if trainer.world_size > 1 and trainer.enable_validation and trainer.val_dataloaders is None:
        with agreeing(trainer), isolate_rng():  # Lightning refuses an empty loader in that process only
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
    check_batches(trainer, pl_module)


def check_batches(trainer: Trainer, pl_module: LightningModule) -> None:
    """Compare the numbers of validation batches.

    A process without any leaves its validation out, with all hooks in it, and goes on while the others wait. With some
    more or less, nothing waits in the validation itself, unless parameters are sharded and put together for each forward.

    Args:
        trainer: the run, with its validation loaders set up.
        pl_module: its module.

    Raises:
        MisconfigurationException: on all processes: names the numbers, and what to do.
    """
    if trainer.world_size == 1:
        return
    counts = gathered(trainer, [float(count) for count in trainer.num_val_batches])
    if all(theirs == counts[0] for theirs in counts):
        return
    shown = "; ".join(f"rank {rank}: {_shown(theirs)}" for rank, theirs in enumerate(counts))
    remedy = (
        "let Lightning pad the samples (use_distributed_sampler=True), set limit_val_batches to a number that each "
        "process has, or pass reference= with batches for relevance"
    )
    empty = [rank for rank, theirs in enumerate(counts) if sum(theirs) == 0]
    if empty:
        raise MisconfigurationException(
            f"there are no validation batches on rank {', '.join(map(str, empty))} ({shown}), which would go on while the "
            f"others wait for its relevance: {remedy}"
        )
    if any(hasattr(parameter, "device_mesh") for parameter in pl_module.parameters()):
        raise MisconfigurationException(
            f"the processes have different numbers of validation batches ({shown}), but put sharded weights together in "
            f"each forward, so that the validation would hang: {remedy}"
        )


def _shown(counts: list[float]) -> str:
    return " + ".join(f"{count:g}" for count in counts)
