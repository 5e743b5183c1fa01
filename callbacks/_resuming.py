"""What a resume has to make up for, and what neither Lightning's checkpoints nor ours can bring back."""

import math

from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lrp_prune.callbacks._rounds import Times


def skipped_validation(trainer: Trainer) -> int | None:
    """The epoch of a validation that was due after the batch that a checkpoint was written in.

    ``ModelCheckpoint(every_n_train_steps=...)`` writes in ``on_train_batch_end``, before that validation, and Lightning
    takes it for done when it resumes. To be asked in ``on_train_start``.

    Args:
        trainer: the training that begins.

    Returns:
        The epoch, or ``None`` if this is no resume, or no validation was left out.
    """
    loop = trainer.fit_loop.epoch_loop
    if not getattr(loop, "restarted_on_train_batch_end", False) or not trainer.enable_validation:
        return None
    progress, between, interval = loop.batch_progress, trainer.val_check_batch, trainer.check_val_every_n_epoch
    last = progress.is_last_batch or progress.current.ready >= trainer.num_training_batches
    epoch = trainer.current_epoch - last  # of the last batch's epoch, Lightning has already gone on to the next
    if interval is not None and (epoch + 1) % interval:
        return None
    if between is None or math.isinf(between):
        due = last
    else:
        due = (progress.total.ready if interval is None else progress.current.ready) % between == 0
    return epoch if due else None


def warn_of_skipped(trainer: Trainer, lost: str, every_n_epochs: int = 1) -> bool:
    """Say what is lost with a validation that is left out, if one is. To be asked in ``on_train_start``.

    Args:
        trainer: the training that begins.
        lost: what would have been done in it.
        every_n_epochs: of so many epochs the last one's validation is of use alone.

    Returns:
        Whether one is left out.
    """
    epoch = skipped_validation(trainer)
    if epoch is not None and epoch % every_n_epochs == every_n_epochs - 1:
        rank_zero_warn(
            f"{trainer.ckpt_path} was written before the validation of epoch {epoch}, which Lightning takes for done: {lost} "
            "(checkpoints that are written in or after validations have none to come)"
        )
        return True
    return False


def warn_of_losses(trainer: Trainer, pl_module: LightningModule) -> None:
    """Say what a resumed training has lost, with pruning as without. To be called in ``on_train_start``."""
    if not trainer.ckpt_path or trainer.global_step == 0:
        return
    lost = []
    if _inside_window(trainer):
        lost.append(
            f"gradients accumulated over part of a window of {trainer.accumulate_grad_batches} batches (write checkpoints "
            "after optimizer steps: every_n_train_steps=, or validate after a whole number of windows)"
        )
    dropout = next((name for name, module in pl_module.named_modules() if _is_random(module)), None)
    if dropout is not None:
        lost.append(
            f"the state of the random generators, which {dropout!r} draws from (seed them for each batch, by the epoch and "
            "the batch's index, if resumed runs have to be equal)"
        )
    if lost:
        rank_zero_warn(
            f"{trainer.ckpt_path} lacks what Lightning does not store: {'; '.join(lost)}. The training goes on, but not bit "
            "for bit as it would have without the interruption; pruning adds nothing to this"
        )


def warn_within_window(trainer: Trainer) -> bool:
    """Say, when a checkpoint is written, that the gradients accumulated so far are not in it.

    Returns:
        Whether that is so.
    """
    inside = trainer.state.fn == "fit" and _inside_window(trainer)
    if inside:
        batch = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        rank_zero_warn(
            f"a checkpoint is written after batch {batch} of the epoch, within a window of "
            f"{trainer.accumulate_grad_batches} batches whose gradients Lightning does not store: a resume from it differs "
            "from the uninterrupted training. Write checkpoints after optimizer steps (every_n_train_steps=), or validate "
            "after a whole number of windows"
        )
    return inside


def _inside_window(trainer: Trainer) -> bool:
    if trainer.accumulate_grad_batches == 1 or not trainer.lightning_module.automatic_optimization:
        return False
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return ready % trainer.accumulate_grad_batches != 0 and ready < trainer.num_training_batches


def _is_random(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


def warn_of_late_begin(trainer: Trainer, callback: str, times: Times, done: int, delay: int) -> None:
    """Say that a training which had begun without pruning is pruned from now on.

    Args:
        trainer: the training.
        callback: which of its callbacks, in words.
        times: of the rounds, delayed already.
        done: rounds that are done.
        delay: by how many epochs or steps all rounds are later.
    """
    unit = "steps" if times.by_steps else "epochs"
    rank_zero_warn(
        f"{trainer.ckpt_path} was written without {callback}, so that no masks are known from it: "
        f"pruning begins with round {done + 1} of {times.count}, and "
        f"{f'all rounds are delayed by {delay} {unit}' if delay else 'its rounds keep their times'}"
    )


def warn_of_pending(done: int) -> None:
    """Say that the masks of the round after so many are applied at the end."""
    rank_zero_warn(
        f"the training ended after round {done + 1} had collected and before it could prune: its masks are applied now, with no "
        "training after them and in no checkpoint written so far"
    )


def warn_of_refused(done: int, count: int) -> None:
    """Say that the masks of the round after so many are not applied at the end, as another callback refuses the round."""
    rank_zero_warn(
        f"the training ended after {done} of {count} pruning rounds: round {done + 1} had collected and is not applied, as "
        "RoundQuality refuses rounds with no training after them, or any more"
    )
