"""Masks as they are written: into checkpoints, and into files."""

import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrp_prune.distributed.sharding import is_first
from lrp_prune.selection import bits
from lrp_prune.storage import Together, load_tensors, save_tensors

if TYPE_CHECKING:
    from lrp_prune.pruning.masks import Masks

_STATE_VERSION = 1


def state_of(masks: "Masks") -> dict[str, Any]:
    """See :meth:`Masks.state_dict`."""
    found = {}
    for name in masks:
        whole = masks.whole_bits(name)
        if is_first(masks.sharding(name).mesh):
            found[name] = whole
    return {"version": _STATE_VERSION, **_description(masks), "bits": found}


def checked_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state that masks can be made of.

    Raises:
        ValueError: if it is of another version, or lacks bits.
    """
    if state.get("version") != _STATE_VERSION:
        raise ValueError(
            f"the masks' state has version {state.get('version')!r}, this lrp-prune reads {_STATE_VERSION}"
        )
    if set(state["bits"]) != set(state["shapes"]):
        raise ValueError(
            "the masks' state has no bits: of a sharded model only the first process's state holds the masks"
        )
    return state


def save(masks: "Masks", path: str | os.PathLike[str]) -> None:
    """See :meth:`Masks.save`."""
    save_tensors(path, "masks", {name: _together(masks, name) for name in masks}, _description(masks))


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Packed masks by name and what else is known of them, see :meth:`Masks.load`.

    Raises:
        ValueError: if the file is damaged, of another kind, or of a newer version.
    """
    tensors, description = load_tensors(path, "masks")
    if set(tensors) != set(description.get("shapes", ())):
        raise ValueError(f"{path} is damaged: its masks and their shapes have different names")
    return {name: tensors[name] for name in description["shapes"]}, description


def _description(masks: "Masks") -> dict[str, Any]:
    return {
        "granularity": masks.granularity,
        "shapes": {name: list(shape) for name, shape in masks.shapes.items()},
        "unscored": dict(masks.unscored),
        "layouts": dict(masks.layouts),
    }


def _together(masks: "Masks", name: str) -> Tensor | Together:
    sharding = masks.sharding(name)
    if sharding.mesh is None:
        return masks.bits(name)
    return Together((bits.num_bytes(sharding.numel),), torch.uint8, partial(masks.whole_bits, name), sharding.mesh)
