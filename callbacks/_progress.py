"""The progress of a collection, or of a recalibration, beside Lightning's own bars."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        description: what is done.
    """

    def __init__(self, trainer: Trainer, total: float, description: str = _DESCRIPTION) -> None:
        self._tqdm: Any = None
        self._rich: Any = None
        bar = trainer.progress_bar_callback
        if not trainer.is_global_zero or bar is None or not getattr(bar, "is_enabled", True):
            return
        count = int(total) if total != float("inf") else None
        if isinstance(bar, RichProgressBar):
            if bar.progress is not None and count is not None:  # Lightning's rich bar has no tasks of unknown length
                self._rich = bar.progress
                self._task = bar.progress.add_task(f"[white]{description}", total=count)
        elif isinstance(bar, TQDMProgressBar):
            # Below the training bar and the validation bar.
            self._tqdm = Tqdm(
                desc=description,
                total=count,
                position=2 * bar.process_position + 2,
                leave=False,
                dynamic_ncols=True,
                file=sys.stdout,
            )

    def advance(self, batches: int = 1) -> None:
        """One more batch is done, or several."""
        if self._tqdm is not None:
            self._tqdm.update(batches)
        if self._rich is not None:
            self._rich.update(self._task, advance=batches)

    def close(self) -> None:
        """Take the bar away."""
        if self._tqdm is not None:
            self._tqdm.close()
            self._tqdm = None
        if self._rich is not None:
            self._rich.remove_task(self._task)
            self._rich = None


@contextmanager
def beside(trainer: Trainer, description: str, total: float) -> Iterator[Callable[[int], None]]:
    """A bar for the time of a context; yields what is told of batches."""
    shown = CollectionProgress(trainer, total, description)
    try:
        yield shown.advance
    finally:
        shown.close()
