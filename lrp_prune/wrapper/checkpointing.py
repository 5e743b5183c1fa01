"""How patches go into checkpoints and come out of them: a wrapper's hooks, and what its state is."""

import io
from collections.abc import Callable
from typing import Any

import torch

from lrp_prune.correction.patch import Patch
from lrp_prune.distributed.sharding import at_rest

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


def saving(wrapper: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    """Checkpoints have the patches outside of the state dict too: a strategy may load the weights alone, by itself."""

    def save_then(checkpoint: dict[str, Any]) -> None:
        checkpoint[PATCHES] = wrapper.get_extra_state()
        method(checkpoint)

    return save_then


def loading(wrapper: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    """Where a strategy has loaded the weights already, the patches follow them."""

    def load_then(checkpoint: dict[str, Any]) -> None:
        if "state_dict" not in checkpoint:
            wrapper.follow(checkpoint.get(PATCHES))
        method(checkpoint)

    return load_then


def without_corrections(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State dicts have uncorrected weights."""
    at_rest(module)
    keys: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        # Activation checkpointing takes its own segment out of the keys, by a hook that has run by now.
        for key in {name, name.replace("_checkpoint_wrapped_module.", "")}:
            keys.setdefault(id(parameter), []).append(prefix + key)
    module._corrections.without(state, keys)


def before_load(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Weights are loaded into an uncorrected model."""
    module.check_version(state.get(f"{prefix}_extra_state"))
    # What is not loaded must be uncorrected too when everything is corrected again.
    module._corrections.suspend()
    state.setdefault(f"{prefix}_extra_state", module.get_extra_state())


def after_load(module: Any, incompatible_keys: Any = None) -> None:
    """Loaded weights are corrected by the patches that came with them, else by those that there are."""
    state, module._loaded = module._loaded, None
    if state is None:
        module._corrections.renew()
        return
    module._pending = {}
    patches = {name: Patch.from_state_dict(patch) for name, patch in state["patches"].items()}
    module._corrections.replace(patches, state["strengths"])
