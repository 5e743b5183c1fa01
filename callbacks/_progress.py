"""The progress of a collection, beside Lightning's own bars."""

import sys
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

_DESCRIPTION = "Collecting relevance"


class CollectionProgress:
    """A bar of batches on rank 0, in the style of the trainer's progress bar; nothing where that is off.

    Args:
        trainer: whose progress bar decides.
        total: batches to come; infinite if unknown.
    """

    def __init__(self, trainer: Trainer, total: float) -> None:
        self._tqdm: Any = None
        self._rich: Any = None
        bar = trainer.progress_bar_callback
        if not trainer.is_global_zero or bar is None or not getattr(bar, "is_enabled", True):
            return
        count = int(total) if total != float("inf") else None
        if isinstance(bar, RichProgressBar):
            if bar.progress is not None and count is not None:  # Lightning's rich bar has no tasks of unknown length
                self._rich = bar.progress
                self._task = bar.progress.add_task(f"[white]{_DESCRIPTION}", total=count)
        elif isinstance(bar, TQDMProgressBar):
            # Below the training bar and the validation bar.
            self._tqdm = Tqdm(
                desc=_DESCRIPTION,
                total=count,
                position=2 * bar.process_position + 2,
                leave=False,
                dynamic_ncols=True,
                file=sys.stdout,
            )

    def advance(self) -> None:
        """One more batch is done."""
        if self._tqdm is not None:
            self._tqdm.update(1)
        if self._rich is not None:
            self._rich.update(self._task, advance=1)

    def close(self) -> None:
        """Take the bar away."""
        if self._tqdm is not None:
            self._tqdm.close()
            self._tqdm = None
        if self._rich is not None:
            self._rich.remove_task(self._task)
            self._rich = None
