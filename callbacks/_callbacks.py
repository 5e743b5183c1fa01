"""The callbacks of a run, of which each of ours may have to know the others."""

from lightning.pytorch import Callback, Trainer


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """All callbacks of a run, in the order in which their hooks are called."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's callback connector
    return callbacks
