"""Patches beside a saved model: one file each, and an index of their names and strengths."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrp_prune.correction.patch import Patch
from lrp_prune.correction.reading import load_patch
from lrp_prune.distributed.sharding import agree, is_first, local_part, mesh_of, sharding_of

_INDEX = "patches.json"


def save_patches(
    path: str | os.PathLike[str], patches: Mapping[str, Patch], strengths: Mapping[str, float] | None = None
) -> None:
    """Write patches to ``patches/`` in a folder, and ``patches.json`` with their files and strengths; in one process.

    Args:
        path: a folder, which is made if there is none.
        patches: by name.
        strengths: by name; 1 for those that are not named.
    """
    folder = Path(path)
    (folder / "patches").mkdir(parents=True, exist_ok=True)
    index = {}
    for number, (name, patch) in enumerate(patches.items()):
        # A name may hold what no file name may.
        file = f"patches/{number}.safetensors"
        patch.save(folder / file)
        index[name] = {"file": file, "strength": (strengths or {}).get(name, 1.0)}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def save_model(model: Any, path: str | os.PathLike[str], **options: Any) -> None:
    """``save_pretrained`` of a model that ``fully_shard`` may have divided.

    Its weights are then brought together one after the other, in the main memory of the first process, which writes them;
    all processes must call this, and return when the folder is there.

    Raises:
        Exception: what ``save_pretrained`` raises.
        OtherProcessError: it did so in the first process.
    """
    mesh = mesh_of(model)
    if mesh is None:
        model.save_pretrained(path, **options)
        return
    # get_model_state_dict(full_state_dict=True, cpu_offload=True) of torch.distributed.checkpoint gathers as well, but makes two
    # tensors of a tied weight, both of which save_pretrained then writes.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        owner = id(parameters.get(name, tensor))  # tied weights stay one tensor
        if owner not in found:
            whole = sharding_of(tensor, name).gathered(local_part(tensor))
            found[owner] = whole.cpu() if is_first(mesh) else torch.empty(0, device="cpu")
        state[name] = found[owner]
    failure = None
    if is_first(mesh):
        try:
            model.save_pretrained(path, state_dict=state, **options)
        except Exception as error:
            failure = error
    agree(failure, mesh, f"writing {path}")


def load_patches(path: str | os.PathLike[str]) -> tuple[dict[str, Patch], dict[str, float]]:
    """The patches and strengths that :func:`save_patches` wrote.

    Raises:
        ValueError: the index or a patch is damaged.
    """
    folder = Path(path)
    try:
        index = json.loads((folder / _INDEX).read_text())
        files = {str(name): folder / str(entry["file"]) for name, entry in index.items()}
        strengths = {str(name): float(entry["strength"]) for name, entry in index.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / _INDEX} is damaged: {error!r}") from error
    return {name: load_patch(file) for name, file in files.items()}, strengths
