"""Whether a model is the one that a patch was made for, and how strongly it is applied there."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lrp_prune.correction.entries import checksum, is_sharded, locate, same_bits, scaled
from lrp_prune.names import resolve

if TYPE_CHECKING:
    from lrp_prune.correction.patch import Patch


def refusal(name: str, parameter: Tensor, shape: tuple[int, ...]) -> str | None:
    """Why a parameter cannot be patched, if so."""
    if tuple(parameter.shape) != shape:
        return f"{name} has shape {tuple(parameter.shape)}, the patch is of {shape}: it was made for another model"
    if not parameter.is_floating_point():
        return f"{name} has type {parameter.dtype}: quantized weights cannot be patched, load a floating-point model"
    if parameter.device.type == "meta":
        return f"{name} is on the meta device and holds no values yet: load the weights first"
    return None


def resolve_entries(patch: "Patch", model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a patch touches.

    Raises:
        KeyError: if the model has not all of them.
        ValueError: if one cannot be patched.
    """
    parameters = resolve(patch, model)
    for name, parameter in parameters.items():
        problem = refusal(name, parameter, patch[name].shape)
        if problem is not None:
            raise ValueError(problem)
    return parameters


def agree(problem: str | None, parameters: Iterable[Tensor]) -> None:
    """Raise a problem on all processes that hold parts of the parameters if one of them has it.

    Raises:
        ValueError: there is a problem, here or elsewhere.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized() and any(map(is_sharded, parameters)):
        everyone: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, problem)
        problem = next((found for found in everyone if found is not None), None)
    if problem is not None:
        raise ValueError(problem)


def applied_strength(patch: "Patch", model: nn.Module) -> float | None:
    """How strongly a patch is applied, 0 for not at all; None if the entries are no scaled originals.

    A strength between 0 and 1 is read off the entries with the largest original values, and each entry must then be its
    original scaled by it, to the rounding of its type.
    """
    entries = []
    for name, parameter in resolve_entries(patch, model).items():
        located = locate(parameter, patch[name].positions)
        entries.append((located.read(), located.own(patch[name].originals).to(parameter.dtype)))
    for strength in (0.0, 1.0):
        if all(bool(same_bits(live, scaled(originals, strength)).all()) for live, originals in entries):
            return strength
    live = torch.cat([live.to(torch.float64) for live, _ in entries])
    originals = torch.cat([originals.to(torch.float64) for _, originals in entries])
    if not bool(live.isfinite().all() & originals.isfinite().all()) or not bool(originals.any()):
        return None
    strength = 1 - float((live @ originals) / (originals @ originals))
    tolerance = max(4 * torch.finfo(values.dtype).eps for values, _ in entries)
    smallest = max(torch.finfo(values.dtype).tiny for values, _ in entries)
    close = (live - originals * (1 - strength)).abs() <= tolerance * originals.abs() + smallest
    return strength if 0 < strength < 1 and bool(close.all()) else None


def mismatch(patch: "Patch", model: nn.Module, parameters: Mapping[str, Tensor], strict: bool) -> str | None:
    """How a model differs from what a patch was made for, if it does; ``strict``: anywhere in the touched parameters."""
    for name, parameter in parameters.items():
        entry = patch[name]
        located = locate(parameter, entry.positions)
        equal = same_bits(located.read(), located.own(entry.originals).to(parameter.dtype))
        if not bool(equal.all()):
            already = applied_strength(patch, model)
            if already:
                return f"the patch is applied to this model already, at strength {already:g}: revert it first"
            return (
                f"{name} holds other values than the patch was made for at {int((~equal).sum()):,} of "
                f"{len(equal):,} positions: it was made for another model, or the weights were changed since"
            )
    for name, parameter in parameters.items():
        entry = patch[name]
        comparable = entry.checksum and parameter.dtype == entry.originals.dtype and not is_sharded(parameter)
        if strict and comparable and checksum(parameter) != entry.checksum:
            return (
                f"{name} holds the patched values, but differs elsewhere from what the patch was made for: another "
                "patch is applied, it was trained further, or it is another model; pass strict=False if that is "
                "intended"
            )
    return None


def flat_positions(name: str, given: Tensor, parameter: Tensor) -> Tensor:
    """Ascending int64 positions from a bool mask of a parameter's shape, or from flat positions in any order."""
    if given.dtype == torch.bool:
        if given.shape != parameter.shape:
            raise ValueError(
                f"the mask of {name} has shape {tuple(given.shape)}, the parameter {tuple(parameter.shape)}: "
                "was it made for another model?"
            )
        return given.reshape(-1).nonzero().view(-1).cpu()
    if given.dtype not in (torch.int64, torch.int32) or given.dim() != 1:
        raise ValueError(f"the positions of {name} must be flat integers or a bool mask, got {given.dtype}")
    flat: Tensor = torch.unique(given.cpu().to(torch.int64))
    if len(flat) and not 0 <= int(flat[0]) <= int(flat[-1]) < parameter.numel():
        raise ValueError(f"positions of {name} are outside of its {parameter.numel()} entries")
    return flat
