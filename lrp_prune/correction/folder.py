"""Patches beside a saved model: one file each, and an index of their names and strengths."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from lrp_prune.correction.patch import Patch

_INDEX = "patches.json"


def save_patches(
    path: str | os.PathLike[str], patches: Mapping[str, Patch], strengths: Mapping[str, float] | None = None
) -> None:
    """Write patches to ``patches/`` in a folder, and ``patches.json`` with their files and strengths.

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
    return {name: Patch.load(file) for name, file in files.items()}, strengths
