"""Whether a model is the one that a patch was made for, and how strongly it is applied there."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lrp_prune.correction.entries import Entries, checksum, read, same_bits, scaled
from lrp_prune.distributed.sharding import Sharding, all_gathered, is_sharded, local_part, sharding_of
from lrp_prune.names import class_name, resolve, unwrap


def refusal(name: str, parameter: Tensor, shape: tuple[int, ...]) -> str | None:
    """Why a parameter cannot be patched, if so."""
    if tuple(parameter.shape) != shape:
        return f"{name} has shape {tuple(parameter.shape)}, the patch is of {shape}: it was made for another model"
    if not parameter.is_floating_point():
        return f"{name} has type {parameter.dtype}: quantized weights cannot be patched, load a floating-point model"
    if parameter.device.type == "meta":
        return f"{name} is on the meta device and holds no values yet: load the weights first"
    return None


def resolve_entries(patch: Mapping[str, Entries], model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a patch touches.

    Raises:
        KeyError: if the model has not all of them.
        ValueError: if one cannot be patched.
    """
    try:
        parameters = resolve(patch, model)
    except KeyError:
        depths = _depths(patch, model)
        if depths:
            raise KeyError(
                f"the patch names parameters of {class_name(unwrap(model))} at several depths, {depths[0]!r} and "
                f"{depths[1]!r}: it unites patches of a module and of one around it, so make both on the same module"
            ) from None
        raise
    for name, parameter in parameters.items():
        problem = refusal(name, parameter, patch[name].shape)
        if problem is not None:
            raise ValueError(problem)
    return parameters


def awaited(patch: Mapping[str, Entries], model: nn.Module) -> bool:
    """Whether a model has yet to get some of a patch's parameters, or their values; not if one has another shape."""
    try:
        parameters = resolve(patch, model)
    except KeyError:
        return True
    fitting = all(tuple(parameter.shape) == patch[name].shape for name, parameter in parameters.items())
    return fitting and any(parameter.device.type == "meta" for parameter in parameters.values())


def _depths(patch: Mapping[str, Entries], model: nn.Module) -> tuple[str, str] | None:
    """Two names that a model has each, but not both at one depth; None if that is not why names are not found."""
    names = list(patch)
    if not all(_has(model, name) for name in names):
        return None
    return next(((names[0], name) for name in names[1:] if not _has(model, names[0], name)), None)


def _has(model: nn.Module, *names: str) -> bool:
    try:
        resolve(names, model)
    except KeyError:
        return False
    return True


def refuse_together(problem: str | None, parameters: Iterable[Tensor]) -> None:
    """Raise a problem on all processes that hold parts of the parameters if one of them has it.

    Raises:
        ValueError: there is a problem, here or elsewhere.
    """
    mesh = next((sharding_of(parameter).mesh for parameter in parameters if is_sharded(parameter)), None)
    problem = next((found for found in all_gathered(problem, mesh) if found is not None), None)
    if problem is not None:
        raise ValueError(problem)


def applied_strength(patch: Mapping[str, Entries], model: nn.Module) -> float | None:
    """How strongly a patch is applied, 0 for not at all; None if the entries are no scaled originals.

    A strength between 0 and 1 is read off the entries with the largest original values, and each entry must then be its
    original scaled by it, to the rounding of its type.
    """
    return _strength(patch, live_entries(patch, resolve_entries(patch, model)))


def live_entries(patch: Mapping[str, Entries], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the parameters hold at a patch's positions; of sharded ones on all processes, which must all call this."""
    return {name: read(parameter, patch[name].positions) for name, parameter in parameters.items()}


def _strength(patch: Mapping[str, Entries], found: Mapping[str, Tensor]) -> float | None:
    entries = [(live, patch[name].originals.to(live.dtype)) for name, live in found.items()]
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


def verify(patch: Mapping[str, Entries], model: nn.Module, strict: bool) -> None:
    """Refuse a model that is not what a patch was made for; ``strict``: anywhere in the touched parameters.

    Raises:
        KeyError: the model has not all parameters.
        ValueError: it differs; on all processes that a model is sharded over.
    """
    parameters = resolve_entries(patch, model)
    refuse_together(_other_values(patch, live_entries(patch, parameters)), parameters.values())
    if strict:
        refuse_together(_other_checksum(patch, parameters), parameters.values())


def _other_values(patch: Mapping[str, Entries], live: Mapping[str, Tensor]) -> str | None:
    """How the patched entries differ from what they were, if they do."""
    for name, values in live.items():
        equal = same_bits(values, patch[name].originals.to(values.dtype))
        if not bool(equal.all()):
            already = _strength(patch, live)
            if already:
                return f"the patch is applied to this model already, at strength {already:g}: revert it first"
            return (
                f"{name} holds other values than the patch was made for at {int((~equal).sum()):,} of "
                f"{len(equal):,} positions: it was made for another model, or the weights were changed since"
            )
    return None


def _other_checksum(patch: Mapping[str, Entries], parameters: Mapping[str, Tensor]) -> str | None:
    """Which parameter differs elsewhere, if one does; sharded ones are brought together one after the other."""
    problem = None
    for name, parameter in parameters.items():
        entry = patch[name]
        # All processes go through all parameters, whatever one of them has found.
        if entry.checksum and parameter.dtype == entry.originals.dtype and checksum(parameter) != entry.checksum:
            problem = problem or (
                f"{name} holds the patched values, but differs elsewhere from what the patch was made for: another "
                "patch is applied, it was trained further, or it is another model; pass strict=False if that is "
                "intended"
            )
    return problem


def flat_positions(name: str, given: Tensor, parameter: Tensor) -> Tensor:
    """Ascending int64 positions from a bool mask of a parameter's shape, or from flat positions in any order.

    A mask may be a ``DTensor``; all processes must call this then.
    """
    sharding = sharding_of(given, f"the mask of {name}")
    if given.dtype == torch.bool:
        if given.shape != parameter.shape:
            raise ValueError(
                f"the mask of {name} has shape {tuple(given.shape)}, the parameter {tuple(parameter.shape)}: "
                "was it made for another model?"
            )
        return marked_positions(local_part(given), sharding)
    if given.dtype not in (torch.int64, torch.int32) or given.dim() != 1:
        raise ValueError(f"the positions of {name} must be flat integers or a bool mask, got {given.dtype}")
    flat: Tensor = torch.unique(given.cpu().to(torch.int64))
    if len(flat) and not 0 <= int(flat[0]) <= int(flat[-1]) < parameter.numel():
        raise ValueError(f"positions of {name} are outside of its {parameter.numel()} entries")
    return flat


def marked_positions(mask: Tensor, sharding: Sharding) -> Tensor:
    """Ascending flat positions of what is marked in a tensor, or in the parts that processes have of it, for all of them."""
    if sharding.dim is None:
        return mask.reshape(-1).nonzero().view(-1).cpu()
    coordinates = mask.nonzero().cpu()
    coordinates[:, sharding.dim] += sharding.bounds[0]
    strides = torch.tensor(torch.empty(sharding.shape, device="meta").stride(), device="cpu")
    everywhere = all_gathered((coordinates * strides).sum(1), sharding.mesh)
    # Where parts are replicated as well, several processes have the same.
    positions: Tensor = torch.unique(torch.cat(everywhere))
    return positions
