"""The callbacks of a run, of which each of ours may have to know the others."""

from typing import Any

from lightning.pytorch import Callback, Trainer


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """All callbacks of a run, in the order in which their hooks are called."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's callback connector
    return callbacks


def copied_state(callback: Callback, *left_out: str) -> dict[str, Any]:
    """What a copy of a callback, or a pickled one, has: not what belongs to the run that it is made in.

    Lightning gives each callback the module's ``log``, through which the module and its trainer would go along.

    Args:
        callback: the one that is copied.
        *left_out: attributes that are None in the copy.
    """
    state = {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict")}
    return {**state, **dict.fromkeys(left_out)}
