"""One way to write tensors to a file: safetensors with a kind and a version, never half-written, nothing executed."""

import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrp_prune.distributed.sharding import agree, is_first

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FORMAT_VERSION = 1
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


def save_tensors(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, "Tensor | Together"],
    description: Mapping[str, Any],
) -> None:
    """Write tensors and a JSON description atomically: the file appears complete, or the old one stays.

    Tensors of which each process has a part (:class:`Together`) are brought together one after the other, and the first
    process writes each as it comes; all processes must call this then, and all raise if that one cannot write.
    """
    path = Path(path)
    metadata = {"format": f"lrp_prune.{kind}", "version": str(FORMAT_VERSION), "order": json.dumps(list(tensors))}
    metadata["description"] = json.dumps(description)
    mesh = next((tensor.mesh for tensor in tensors.values() if isinstance(tensor, Together)), None)
    if mesh is not None:
        _save_together(path, tensors, metadata, mesh)
        return
    whole = {name: _whole(tensor) for name, tensor in tensors.items()}
    _write(path, lambda temporary: save_file(whole, temporary, metadata))


class Together(NamedTuple):
    """A tensor of which each process has a part.

    Args:
        shape: of the whole.
        dtype: of its entries.
        gather: makes the whole; called in all processes at once.
        mesh: these processes.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    gather: Callable[[], Tensor]
    mesh: "DeviceMesh"


def _whole(tensor: Tensor | Together) -> Tensor:
    return (tensor.gather() if isinstance(tensor, Together) else tensor.detach()).cpu().contiguous()


def _save_together(
    path: Path, tensors: Mapping[str, Tensor | Together], metadata: dict[str, str], mesh: "DeviceMesh"
) -> None:
    """Stream a safetensors file (a header of JSON, then the bytes) from the first process."""
    # Wide types first, so that each tensor begins at a multiple of its entries' size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    remaining = iter(ordered.values())

    def stream(temporary: str) -> None:
        with open(temporary, "wb") as file:
            file.write(_header(ordered, metadata))
            for tensor in remaining:
                file.write(_whole(tensor).reshape(-1).view(torch.uint8).numpy().data)

    failure = None
    if is_first(mesh):
        try:
            _write(path, stream)
        except Exception as error:
            failure = error
    for tensor in remaining:  # none is left in a process that has written them all
        _whole(tensor)
    agree(failure, mesh, f"writing {path}")


def _header(tensors: Mapping[str, Tensor | Together], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, tensor in tensors.items():
        stop = start + math.prod(tensor.shape) * tensor.dtype.itemsize
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write(path: Path, write: Callable[[str], None]) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def kind_of(path: str | os.PathLike[str]) -> str:
    """What kind of tensors a file holds; empty if it is none of ours.

    Raises:
        ValueError: if it is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("format", "")).removeprefix("lrp_prune.")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


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
            lacking = [key for key in ("version", "order", "description") if key not in metadata]
            if lacking:
                raise ValueError(f"{path} is damaged: it has no {lacking[0]!r}")
            if int(metadata["version"]) > FORMAT_VERSION:
                raise ValueError(
                    f"{path} has format version {metadata['version']}, this lrp-prune reads up to {FORMAT_VERSION}: upgrade it"
                )
            tensors = {name: file.get_tensor(name) for name in json.loads(metadata["order"])}
            return tensors, json.loads(metadata["description"])
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
