"""How a recalibration compares outputs: decided from the model and its first batch, whatever chose the masks."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lrp_prune.engine.unaltered import unaltered
from lrp_prune.models.batches import to_device
from lrp_prune.models.states import unchanged_state
from lrp_prune.pruning.processes import Processes
from lrp_prune.targets import Inferred
from lrp_prune.targets.naming import TARGETS, describe, named

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_logger = logging.getLogger("lrp_prune")

BY_SQUARES = ""
"""The target of outputs of which nothing is known."""


def asked_of(target: Any, explained: str) -> Any:
    """What says how outputs are compared: the target that was asked for, or what was explained; None if nothing does.

    Args:
        target: of the method; None, or to be inferred, where it says nothing.
        explained: what relevance of this model is about, by its name, as in :attr:`lrp_prune.Relevance.target`.

    Example:
        >>> asked_of("token", "class"), asked_of(None, "ClassLabel(odds=1)"), asked_of(Inferred(), "nothing")
        ('token', 'class', None)
        >>> from lrp_prune.targets import TokenLabel
        >>> asked_of(TokenLabel(ignored=255), ""), asked_of(TokenLabel(class_dim=1), "")
        ('token', TokenLabel(class_dim=1))
    """
    if target is not None and not isinstance(target, Inferred):
        return (_named(describe(target)) if type(target) in TARGETS.values() else None) or target
    return _named(explained)


def _named(description: str) -> str | None:
    """The target's name, whatever its options; None where it says itself along which dimension the choices are."""
    return None if "class_dim=" in description else named(description)


def comparing_by(
    module: nn.Module, batch: Any, target: Any, processes: Processes, mesh: "DeviceMesh | None", device: torch.device
) -> Any:
    """The target by which outputs are compared: as it was given, else inferred; by squares where it cannot be told.

    Args:
        module: the dense model, which is run on the batch if there is something to infer, without a trace.
        batch: the first one of this process.
        target: a name, a function, or None.
        processes: those that decide together, for one answer.
        mesh: those that the model is divided among.
        device: of the batch.
    """
    if target is not None:
        return target
    with processes.agreeing():
        found, reason = _inferred(module, to_device(batch, device), mesh)
    everyone = list(dict.fromkeys(processes.gathered(found)))
    if len(everyone) > 1:
        reason = f"the processes' first batches are read differently ({', '.join(map(repr, everyone))})"
    if len(everyone) > 1 or found == BY_SQUARES:
        _logger.info("recalibration compares outputs by squares: %s", reason)
        return BY_SQUARES
    return found


def _inferred(module: nn.Module, batch: Any, mesh: "DeviceMesh | None") -> tuple[str, str]:
    """The name of the target that fits, and why there is none."""
    try:
        with unaltered(module), unchanged_state(module):
            chosen = Inferred(tells=False).decide(module, batch, mesh)
    except ValueError as error:
        return BY_SQUARES, str(error)
    except RuntimeError as error:
        if mesh is None:  # else it may be that another process could not tell
            raise
        return BY_SQUARES, str(error)
    return named(describe(chosen)) or BY_SQUARES, "no target has a name"
