"""One way to write tensors to a file: safetensors with a kind and a version, never half-written, nothing executed."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT_VERSION = 1


def save_tensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Write tensors and a JSON description atomically: the file appears complete, or the old one stays."""
    path = Path(path)
    metadata = {"format": f"lrp_prune.{kind}", "version": str(FORMAT_VERSION), "order": json.dumps(list(tensors))}
    metadata["description"] = json.dumps(description)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote.

    Raises:
        ValueError: if the file is damaged, holds something else than ``kind``, or was written by a newer version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != f"lrp_prune.{kind}":
                raise ValueError(
                    f"{path} holds {metadata.get('format', 'unmarked tensors')!r}, expected 'lrp_prune.{kind}'"
                )
            if int(metadata["version"]) > FORMAT_VERSION:
                raise ValueError(
                    f"{path} has format version {metadata['version']}, this lrp-prune reads up to {FORMAT_VERSION}: upgrade it"
                )
            tensors = {name: file.get_tensor(name) for name in json.loads(metadata["order"])}
            return tensors, json.loads(metadata["description"])
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
