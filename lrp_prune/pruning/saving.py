"""Pruned models on disk: sharded safetensors, of which every pruned weight is read again and is zero."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lrp_prune.distributed.sharding import is_sharded
from lrp_prune.models.loaded import check_loaded
from lrp_prune.models.subject import forwarded
from lrp_prune.names import class_name, resolve
from lrp_prune.pruning.masking import fitting
from lrp_prune.pruning.masks import Masks


class Saved(NamedTuple):
    """What was found on disk.

    Args:
        files: names of the safetensors files.
        zeros: how many pruned weights were read, all of them zero.
        weights: of so many.
    """

    files: tuple[str, ...]
    zeros: int
    weights: int

    def __str__(self) -> str:
        number = f"{len(self.files)} files" if len(self.files) > 1 else self.files[0]
        return f"{number}: {self.zeros:,} of {self.weights:,} weights are pruned, and zero ({self.zeros / self.weights:.2%})"


def save_pruned(
    model: nn.Module, folder: str | os.PathLike[str], masks: Masks, *, max_shard_size: int | str = "5GB", **options: Any
) -> Saved:
    """Save a Hugging Face model by its ``save_pretrained``, and read what was written: what is pruned must be zero there.

    The files are read tensor by tensor. Where a model is written under other names than it has (experts of a mixture), it is
    loaded again by ``from_pretrained`` instead, and looked at whole.

    Args:
        model: the pruned model, or a ``LightningModule`` that holds it.
        folder: where to.
        masks: what it is pruned by.
        max_shard_size: of a file, as ``save_pretrained`` takes it.
        **options: of ``save_pretrained``.

    Returns:
        What was found on disk; printed, it says how many weights are zero.

    Raises:
        ValueError: if a pruned weight of the model is not zero, it has no ``save_pretrained``, is divided or offloaded;
            nothing is written then.
        RuntimeError: if a pruned weight is not zero in the files.
        KeyError: if the model has not all parameters that the masks are about.
    """
    module: Any = forwarded(model)
    if not hasattr(module, "save_pretrained"):
        raise ValueError(
            f"{class_name(module)} has no save_pretrained: write its state_dict() by safetensors, and ask "
            "lrp_prune.pruning.check_saved whether what is pruned is zero"
        )
    masks = fitting(masks, module)
    parameters = resolve(masks, module)
    divided = next((name for name, parameter in parameters.items() if is_sharded(parameter)), None)
    if divided is not None:
        raise ValueError(
            f"{divided} is divided among processes: CorrectedModule(model).save_pretrained(folder) writes it, and "
            "lrp_prune.pruning.check_saved reads it"
        )
    check_loaded(parameters)
    for name, parameter in parameters.items():
        alive = _not_zero(masks, name, parameter.detach())
        if alive:
            raise ValueError(f"{alive} pruned weights of {name} are not zero in the model: masks.apply_(model) first")
    module.save_pretrained(folder, max_shard_size=max_shard_size, **options)
    names = _names(module, parameters)
    found = _files(Path(folder))
    written = {name for held in found.values() for name in held}
    if all(written & set(names[name]) for name in masks):
        return _checked(masks, found, names)
    return check_saved(folder, masks, type(module).from_pretrained)


def check_saved(
    folder: str | os.PathLike[str], masks: Masks, load: Callable[[str], nn.Module] | None = None
) -> Saved:  # fmt: skip
    """Read the safetensors files of a folder, and make sure that what masks prune is zero there.

    Args:
        folder: holds the files.
        masks: of parameters by the names that they have in the files, or those without what comes before the model's own.
        load: reads the model of a folder, as ``AutoModelForCausalLM.from_pretrained`` does, for files with other names than the
            model (mixtures of experts); None to read the files themselves.

    Raises:
        RuntimeError: if a pruned weight is not zero.
        ValueError: if there are no such files, or a name is in none of them.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> masks = Masks({"weight": torch.tensor([[True, False]])})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"weight": torch.tensor([[0.5, 0.0]])}, f"{folder}/model.safetensors")
        ...     print(check_saved(folder, masks))
        model.safetensors: 1 of 2 weights are pruned, and zero (50.00%)
    """
    found = _files(Path(folder))
    if load is not None:
        again = resolve(masks, load(os.fspath(folder)))
        return _counted(masks, found, {name: _not_zero(masks, name, entry.detach()) for name, entry in again.items()})
    written = [name for held in found.values() for name in held]
    names = {
        name: [name] if name in written else [each for each in written if each.endswith(f".{name}")] for name in masks
    }
    lacking = [name for name, each in names.items() if len(each) != 1]
    if lacking:
        what = "several tensors" if names[lacking[0]] else "none"
        raise ValueError(
            f"{what} of {folder} may be {lacking[0]}: were the masks made for another model? If files have names of their "
            "own, pass what reads them, as in load=AutoModelForCausalLM.from_pretrained"
        )
    return _checked(masks, found, names)


def _files(folder: Path) -> dict[Path, list[str]]:
    """The names of the tensors in each file."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if not (file.metadata() or {}).get("format", "").startswith("lrp_prune."):  # masks beside the weights
                found[path] = list(file.keys())
    if not found:
        raise ValueError(f"{folder} has no safetensors files with weights")
    return found


def _names(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, list[str]]:
    """Under which names a parameter may be written, of which tied ones have several."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return {name: by_id[id(parameter)] for name, parameter in parameters.items()}


def _checked(masks: Masks, found: Mapping[Path, list[str]], names: Mapping[str, list[str]]) -> Saved:
    recorded = {alias: name for name, aliases in names.items() for alias in aliases}
    wrong: dict[str, int] = {}
    for alias, tensor in _tensors(found, set(recorded)):
        wrong[recorded[alias]] = _not_zero(masks, recorded[alias], tensor)
    return _counted(masks, found, wrong)


def _tensors(found: Mapping[Path, list[str]], wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
    for path, names in found.items():
        with safe_open(path, framework="pt") as file:
            for name in wanted.intersection(names):
                yield name, file.get_tensor(name)


def _not_zero(masks: Masks, name: str, tensor: Tensor) -> int:
    """How many pruned entries of a tensor are not zero."""
    if tuple(tensor.shape) != tuple(masks.shapes[name]):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, its mask {tuple(masks.shapes[name])}")
    return int(torch.count_nonzero(tensor[~masks.whole(name).to(tensor.device)]))


def _counted(masks: Masks, found: Mapping[Path, list[str]], wrong: Mapping[str, int]) -> Saved:
    damaged = [name for name, number in wrong.items() if number]
    if damaged:
        raise RuntimeError(
            f"{sum(wrong.values())} pruned weights are not zero on disk, in {len(damaged)} tensors, the first is {damaged[0]}"
        )
    return Saved(tuple(path.name for path in found), masks.num_pruned, masks.num_entries)
