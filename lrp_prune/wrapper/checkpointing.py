"""How patches go into checkpoints and come out of them: what their state is, and where it lies."""

import io
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lrp_prune.models.profile import profile_of
from lrp_prune.models.subject import forwarded
from lrp_prune.names import unwrap

PATCHES = "lrp_prune_patches"
"""The key of patches in a checkpoint."""


def packed(state: dict[str, Any]) -> dict[str, Any]:
    """A state as one value: sharded checkpoints are loaded entry by entry into what a module has, which may be another."""
    file = io.BytesIO()
    torch.save(state, file)
    return {"version": state["version"], "packed": file.getvalue()}


def unpacked(state: dict[str, Any]) -> dict[str, Any]:
    """The state, packed or not; nothing in it is executed."""
    found: dict[str, Any] = torch.load(io.BytesIO(state["packed"]), weights_only=True) if "packed" in state else state
    return found


def check_version(state: Mapping[str, Any] | None) -> None:
    """Refuse a state of patches that another version wrote, before anything is changed.

    Raises:
        ValueError: it did.
    """
    if state is not None and state.get("version") != 1:
        raise ValueError(f"the patches' state has version {state.get('version')!r}, this lrp-prune reads 1")


def keys_of(parameters: Iterable[tuple[str, nn.Parameter]], prefix: str) -> dict[int, list[str]]:
    """Where each parameter is in a state dict, by its ``id``.

    Args:
        parameters: by all their names, those of tied weights too.
        prefix: of the module in the state dict.
    """
    keys: dict[int, list[str]] = {}
    for name, parameter in parameters:
        # Activation checkpointing takes its own segment out of the keys, by a hook that has run by now.
        for key in {name, name.replace("_checkpoint_wrapped_module.", "")}:
            keys.setdefault(id(parameter), []).append(prefix + key)
    return keys


def pretrained_in(module: nn.Module) -> nn.Module:
    """What is saved of a module: the model that is run, or where that is a module around it, the Hugging Face model inside."""
    try:
        model = forwarded(module)
    except ValueError:  # several models, of which it need not be said which is run
        model = unwrap(module)
    inner = profile_of(model).inner
    return model if inner is None or hasattr(model, "save_pretrained") else inner
