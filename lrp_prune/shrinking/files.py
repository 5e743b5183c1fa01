"""Files of shrunk models: safetensors, and beside them the shapes and the numbers that an architecture is built to."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrp_prune.models.profile import profile_of
from lrp_prune.names import class_name, unwrap
from lrp_prune.shrinking.cuts import Slot, Swap, setter
from lrp_prune.storage import load_tensors, save_tensors

if TYPE_CHECKING:
    from lrp_prune.shrinking.report import Shrunk

DESCRIPTION = "shrunk.json"
_VERSION = 1


def save_shrunk(shrunk: "Shrunk", folder: str | os.PathLike[str], max_shard_size: int) -> None:
    """See :meth:`lrp_prune.Shrunk.save`."""
    folder, model = Path(folder), shrunk.model
    folder.mkdir(parents=True, exist_ok=True)
    if shrunk.loads_plainly and profile_of(model).inner is model:
        plainly: Any = model
        plainly.save_pretrained(folder, max_shard_size=max_shard_size)
        # That of another model that was here would be loaded in place of this one.
        (folder / DESCRIPTION).unlink(missing_ok=True)
        return
    if shrunk.dense_configuration is not None:  # an architecture of the old sizes is made by it, to be loaded into
        shrunk.dense_configuration.save_pretrained(folder)
    state = _distinct(model)
    shards = list(_shards(state, max_shard_size))
    names = [
        f"shrunk-{index:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "shrunk.safetensors"
        for index in range(1, len(shards) + 1)
    ]
    for file, shard in zip(names, shards, strict=True):
        save_tensors(folder / file, "shrunk", {name: state[name] for name in shard}, {})
    description = {
        "format": "lrp_prune.shrunk",
        "version": _VERSION,
        "model": class_name(model),
        "files": dict(zip(names, shards, strict=True)),
        "shapes": {name: list(tensor.shape) for name, tensor in state.items()},
        "numbers": dict(shrunk.numbers),
    }
    temporary = folder / f".{DESCRIPTION}.tmp"
    temporary.write_text(json.dumps(description, indent=1) + "\n")
    temporary.replace(folder / DESCRIPTION)


def load_shrunk(folder: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Build a dense architecture to the sizes of a shrunk model, and load its weights.

    Args:
        folder: as :meth:`lrp_prune.Shrunk.save` has written it.
        model: the dense architecture, with any weights; on the meta device if all of its tensors are saved (buffers that are not
            ``persistent`` are not). It is changed in place.

    Returns:
        The model, with tensors of its own where the file's shapes are others.

    Raises:
        ValueError: if there is no such description, or it is another architecture's; the model has not changed then.

    Example:
        >>> import tempfile, torch, lrp_prune
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> batches = [(torch.randn(16, 4), torch.randint(2, (16,)))]
        >>> masks = lrp_prune.prune(model, batches, 0.5, granularity="neuron", progress=False)
        >>> shrunk = lrp_prune.shrink(model, masks, batches)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     shrunk.save(folder)
        ...     again = load_shrunk(folder, nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> again[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    folder, module = Path(folder), unwrap(model)
    description = _description(folder)
    own = _places(module)
    shapes: Mapping[str, Sequence[int]] = description["shapes"]
    _check(module, own, shapes, description["model"])
    slots = [slot for name, shape in shapes.items() for slot in _resized(own[name], tuple(shape))]
    slots += _numbers(module, description["numbers"])
    swap = Swap(slots)
    swap.put()
    try:
        for file, names in description["files"].items():
            tensors, _ = load_tensors(folder / file, "shrunk")
            if set(tensors) != set(names):
                raise ValueError(f"{folder / file} does not hold what {DESCRIPTION} says: it is another model's")
            for name, tensor in tensors.items():
                if list(tensor.shape) != list(shapes[name]):
                    raise ValueError(
                        f"{folder / file} has {name} in other shapes than {DESCRIPTION} says: it is another model's"
                    )
                _fill(own[name], tensor)
    except BaseException:
        swap.back()
        raise
    return model


def _description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.exists():
        plain = any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))
        way = ": its configuration says its sizes, load it by from_pretrained" if plain else ""
        raise ValueError(f"{folder} has no {DESCRIPTION}{way}")
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    lacking = [key for key in ("format", "version", "files", "shapes", "numbers", "model") if key not in found]
    if lacking or found["format"] != "lrp_prune.shrunk":
        raise ValueError(f"{path} does not describe a shrunk model{f': it has no {lacking[0]!r}' if lacking else ''}")
    if int(found["version"]) > _VERSION:
        raise ValueError(f"{path} has version {found['version']}, this lrp-prune reads up to {_VERSION}: upgrade it")
    return found


Place = tuple[dict[str, Any], str]
"""A table of a module, and the name of a tensor there."""


def _places(module: nn.Module) -> dict[str, list[Place]]:
    """By the first name of each saved tensor all places that hold it."""
    by_tensor: dict[int, list[Place]] = {}
    names: dict[str, int] = {}
    for path, part in module.named_modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is None or name in part._non_persistent_buffers_set:
                    continue
                by_tensor.setdefault(id(tensor), []).append((table, name))
                names.setdefault(f"{path}.{name}" if path else name, id(tensor))
    first: dict[int, str] = {}
    for name, key in names.items():
        first.setdefault(key, name)
    return {name: by_tensor[key] for key, name in first.items()}


def _distinct(module: nn.Module) -> dict[str, Tensor]:
    return {name: places[0][0][places[0][1]].detach() for name, places in _places(module).items()}


def _shards(state: Mapping[str, Tensor], largest: int) -> Iterator[list[str]]:
    """Names in files of so many bytes at most, in their order."""
    names: list[str] = []
    held = 0
    for name, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        if names and held + size > largest:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _check(
    module: nn.Module, own: Mapping[str, Sequence[Place]], shapes: Mapping[str, Sequence[int]], kind: str
) -> None:
    different = sorted(set(own) ^ set(shapes))
    if different:
        where = "the model" if different[0] in own else "the file"
        raise ValueError(
            f"{different[0]} is in {where} only: it was saved of a {kind}, and the model is a {class_name(module)} "
            "(of the same sizes, and with the same weights tied, as before shrinking?)"
        )
    for name, buffer in module.named_buffers():
        if name not in own and buffer.is_meta:
            raise ValueError(f"{name} has no data and is not saved: make the model on a device with data, not on meta")
    for name, shape in shapes.items():
        table, key = own[name][0]
        mine = tuple(table[key].shape)
        if len(mine) != len(shape) or any(new > old for new, old in zip(shape, mine, strict=True)):
            raise ValueError(
                f"{name} has shape {tuple(shape)} in the file, and {mine} in the model, which must not be smaller"
            )


def _resized(places: Sequence[Place], shape: tuple[int, ...]) -> list[Slot]:
    old = places[0][0][places[0][1]]
    device = "cpu" if old.device.type == "meta" else old.device
    new = torch.empty(shape, dtype=old.dtype, device=device)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, old.requires_grad)
    return [Slot(setter(table, name), old, new) for table, name in places]


def _numbers(module: nn.Module, numbers: Mapping[str, Any]) -> list[Slot]:
    slots = []
    for path, value in numbers.items():
        owner, _, name = path.rpartition(".")
        try:
            part = attrgetter(owner)(module) if owner else module
            old = getattr(part, name)
        except AttributeError as error:
            raise ValueError(f"{class_name(module)} has no {path}: the file is another architecture's") from error
        fitting = isinstance(old, int) if isinstance(value, int) else isinstance(old, tuple | list)
        if not fitting:
            raise ValueError(f"{path} is {old!r} in {class_name(module)}, and {value!r} in the file")
        new = value if isinstance(value, int) else type(old)(value)
        slots.append(Slot(_attribute(part, name), old, new))
    return slots


def _attribute(part: Any, name: str) -> Any:
    return lambda value: setattr(part, name, value)


def _fill(places: Sequence[Place], tensor: Tensor) -> None:
    table, name = places[0]
    with torch.no_grad():
        table[name].copy_(tensor)
