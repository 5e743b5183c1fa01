"""Patches with patches: overlap, union, difference, further rounds; and the tensors that a patch is stored as."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrp_prune.correction.entries import Entries, checksum, locate, read, same_bits, write_together
from lrp_prune.correction.verifying import resolve_entries

if TYPE_CHECKING:
    from lrp_prune.correction.patch import Patch

_POSITIONS, _ORIGINALS = "positions:", "originals:"


def overlap(first: "Patch", second: "Patch", model: nn.Module | None = None) -> dict[str, int]:
    """How many entries of each parameter both patches touch, by the first one's names.

    Raises:
        KeyError: the model has not all parameters.
        ValueError: one of its parameters cannot be patched.
    """
    theirs: dict[Any, list[Tensor]] = {}
    if model is None:
        mine, other = aligned(first, second)
        owners: dict[str, Any] = {name: name for name in mine}
        for name, entry in other.items():
            theirs.setdefault(name, []).append(entry.positions)
    else:
        mine = dict(first)
        owners = {name: id(parameter) for name, parameter in resolve_entries(first, model).items()}
        for name, parameter in resolve_entries(second, model).items():
            theirs.setdefault(id(parameter), []).append(second[name].positions)
    counts = {
        name: int(torch.isin(entry.positions, torch.cat(theirs[owners[name]])).sum())
        for name, entry in mine.items()
        if owners[name] in theirs
    }
    return {name: count for name, count in counts.items() if count}


def aligned(first: "Patch", second: "Patch") -> tuple[dict[str, Entries], dict[str, Entries]]:
    """Both patches' entries under names of one depth, as far as the patches themselves tell.

    A patch that was made on a model has shorter names than one that was made on a module around it. Where the models'
    fingerprints are the same and no name is in both, the prefix that is missing is known from parameters that end alike
    and have the same shape and checksum; a checksum alone says little, since many biases are zero.
    """
    here, there = dict(first), dict(second)
    fingerprint = first.provenance.get("fingerprint")
    if fingerprint is None or fingerprint != second.provenance.get("fingerprint") or here.keys() & there.keys():
        return here, there
    before_mine, before_theirs = _missing_prefixes(here, there), _missing_prefixes(there, here)
    if len(before_mine) + len(before_theirs) != 1:
        return here, there
    mine, theirs = "".join(before_mine), "".join(before_theirs)
    return {mine + name: here[name] for name in here}, {theirs + name: there[name] for name in there}


def _missing_prefixes(short: Mapping[str, Entries], long: Mapping[str, Entries]) -> set[str]:
    """What may be missing before the names of one patch to be those of another."""
    return {
        name.removesuffix(end)
        for name, entry in long.items()
        for end, other in short.items()
        if name.endswith("." + end)
        and entry.checksum
        and (entry.checksum, entry.shape) == (other.checksum, other.shape)
    }


def equal(first: "Patch", second: "Patch") -> bool:
    """Whether both hold the same entries with the same values, bit by bit, whatever their provenance."""
    return set(first) == set(second) and all(
        first[name].shape == second[name].shape
        and torch.equal(first[name].positions, second[name].positions)
        and first[name].originals.dtype == second[name].originals.dtype
        and bool(same_bits(first[name].originals, second[name].originals).all())
        for name in first
    )


def union(first: "Patch", second: "Patch") -> tuple[dict[str, Entries], dict[str, Any]]:
    """Entries and provenance of all that is in one of the two."""
    ours, others = aligned(first, second)
    _check_same_model(ours, others, "unite")
    entries: dict[str, Entries] = {}
    for name in dict.fromkeys((*ours, *others)):
        if name not in ours or name not in others:
            entries[name] = (ours if name in ours else others)[name]
            continue
        mine, theirs = ours[name], others[name]
        new = ~torch.isin(theirs.positions, mine.positions)
        positions, order = torch.cat([mine.positions, theirs.positions[new]]).sort()
        originals = torch.cat([mine.originals, theirs.originals[new]])[order]
        entries[name] = Entries(positions, originals, mine.shape, mine.checksum)
    return entries, _combined_provenance(first, second, "|")


def difference(first: "Patch", second: "Patch") -> tuple[dict[str, Entries], dict[str, Any]]:
    """Entries and provenance of what is in the first and not in the second."""
    ours, others = aligned(first, second)
    _check_same_model(ours, others, "subtract")
    entries: dict[str, Entries] = {}
    for name, mine in ours.items():
        left = (
            ~torch.isin(mine.positions, others[name].positions)
            if name in others
            else torch.ones_like(mine.positions, dtype=torch.bool)
        )
        if bool(left.any()):
            entries[name] = Entries(mine.positions[left], mine.originals[left], mine.shape, mine.checksum)
    if not entries:
        raise ValueError("nothing is left: the other patch touches all entries of this one")
    return entries, _combined_provenance(first, second, "-")


def extended(
    patch: "Patch", model: nn.Module, positions: Mapping[str, Tensor], provenance: Mapping[str, Any]
) -> "Patch":
    """A patch of the model as it was before ``patch`` was applied to it, with further entries at flat positions.

    Raises:
        ValueError: the patch is not applied to the model.
    """
    if not patch.strength_in(model):
        raise ValueError(
            "the patch to extend is not applied to the model: apply it, then collect the relevance of both sets"
        )
    parameters = resolve_entries(patch, model)
    both = dict(positions)
    for name in patch:
        both[name] = torch.cat([both[name], patch[name].positions]) if name in both else patch[name].positions
    places = {name: locate(parameter, patch[name].positions) for name, parameter in parameters.items()}
    applied = [(place, read(parameters[name], patch[name].positions)) for name, place in places.items()]
    write_together((place, patch[name].originals.to(parameters[name].dtype)) for name, place in places.items())
    try:
        return type(patch).from_positions(model, both, **provenance, extends=patch.provenance)
    finally:
        write_together(applied)


def renewed(patch: "Patch", model: nn.Module) -> "Patch":
    """The same entries, with the values and checksums that a model has now; of a sharded one all processes must call this."""
    entries = {
        name: Entries(
            patch[name].positions, read(parameter, patch[name].positions), patch[name].shape, checksum(parameter)
        )
        for name, parameter in resolve_entries(patch, model).items()
    }
    return type(patch)(entries, patch.provenance)


def _combined_provenance(first: "Patch", second: "Patch", operation: str) -> dict[str, Any]:
    kept = ("model", "num_parameters", "fingerprint", "lrp_prune")
    return {
        **{key: first.provenance[key] for key in kept if key in first.provenance},
        "behaviour": f"{first.behaviour} {operation} {second.behaviour}".strip(),
        "operation": operation,
        "of": [first.provenance, second.provenance],
    }


def _check_same_model(first: Mapping[str, Entries], second: Mapping[str, Entries], action: str) -> None:
    for name in first:
        if name not in second:
            continue
        mine, theirs = first[name], second[name]
        if mine.shape != theirs.shape or mine.originals.dtype != theirs.originals.dtype:
            raise ValueError(
                f"cannot {action} patches of different models: {name} is {mine.originals.dtype} {mine.shape} in one, "
                f"{theirs.originals.dtype} {theirs.shape} in the other"
            )
        if mine.checksum and theirs.checksum and mine.checksum != theirs.checksum:
            raise ValueError(f"cannot {action} patches of different models: the checksums of {name} differ")
        common = torch.isin(mine.positions, theirs.positions)
        others = torch.isin(theirs.positions, mine.positions)
        if not bool(same_bits(mine.originals[common], theirs.originals[others]).all()):
            raise ValueError(f"cannot {action} patches of different models: the original values of {name} differ")


def pack(patch: "Patch") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (positions in 4 bytes where they fit) and a description of plain values."""
    tensors: dict[str, Tensor] = {}
    shapes, checksums = {}, {}
    for name in patch:
        entry = patch[name]
        small = int(entry.positions[-1]) < 2**31
        tensors[_POSITIONS + name] = entry.positions.to(torch.int32 if small else torch.int64)
        tensors[_ORIGINALS + name] = entry.originals
        shapes[name], checksums[name] = list(entry.shape), entry.checksum
    return tensors, {"shapes": shapes, "checksums": checksums, "provenance": patch.provenance}


def unpack(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> tuple[dict[str, Entries], dict[str, Any]]:
    """What :func:`pack` packed."""
    entries = {
        name: Entries(
            tensors[_POSITIONS + name].to(device="cpu", dtype=torch.int64),
            tensors[_ORIGINALS + name].cpu(),
            shape,
            description["checksums"][name],
        )
        for name, shape in description["shapes"].items()
    }
    return entries, dict(description["provenance"])
