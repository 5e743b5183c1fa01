"""Layers that are recomputed in the backward pass: relevance goes through them, and they save memory as in a training.

``torch.utils.checkpoint`` runs a layer without storing its activations and runs it again in the backward pass. Its
non-reentrant kind works with any backward pass; the reentrant kind refuses ``torch.autograd.grad``, which is what relevance is
propagated by (``.backward()`` would write gradients). For the time of a pass the reentrant kind is therefore the other one.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint
from torch import nn

_REFUSAL = "When use_reentrant=True"


class _NonReentrant:
    """Stands for torch's ``CheckpointFunction``, which ``checkpoint(..., use_reentrant=True)`` looks up when it is called."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )


@contextmanager
def propagating_checkpoints() -> Iterator[None]:
    """Let reentrant checkpoints be non-reentrant ones inside, and refuse by name those that are made in another way.

    Raises:
        ValueError: a reentrant checkpoint of another library was in the way of the backward pass.
    """
    original = torch.utils.checkpoint.CheckpointFunction
    torch.utils.checkpoint.CheckpointFunction = _NonReentrant  # type: ignore[assignment,misc]  # restored below
    try:
        yield
    except RuntimeError as error:
        if _REFUSAL not in str(error):
            raise
        raise ValueError(
            "a layer is recomputed by a reentrant checkpoint that is not torch's own checkpoint(), and relevance cannot be "
            "propagated through it: use torch.utils.checkpoint.checkpoint, or its use_reentrant=False kind"
        ) from error
    finally:
        torch.utils.checkpoint.CheckpointFunction = original  # type: ignore[misc]


@contextmanager
def recomputed_in_evaluation(model: nn.Module) -> Iterator[None]:
    """Let Hugging Face's layers be recomputed although the model is in evaluation mode, where they otherwise are not.

    ``gradient_checkpointing_enable`` takes effect in training mode only, so that a pass in evaluation mode would need all the
    memory that was to be saved. The mode of the layer itself decides, not that of what is in it: only this one flag is
    set, and dropout is off in any case.

    Args:
        model: in evaluation mode; any module.
    """
    layers: list[Any] = [module for module in model.modules() if _is_recomputed(module)]
    own = [(layer, layer.training, layer.__dict__.get("_gradient_checkpointing_func")) for layer in layers]
    for layer in layers:
        layer.training = True
        layer._gradient_checkpointing_func = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    try:
        yield
    finally:
        for layer, training, function in own:
            layer.training = training
            del layer._gradient_checkpointing_func
            if function is not None:
                layer._gradient_checkpointing_func = function


def _is_recomputed(module: nn.Module) -> bool:
    hugging_face = any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)
    return hugging_face and bool(getattr(module, "gradient_checkpointing", False))
