"""Patches with patches: overlap, union, difference, further rounds; and the tensors that a patch is stored as."""

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.correction.entries import Entries, checksum, locate, read, same_bits, write_together
from lrp_prune.correction.verifying import applied_strength, resolve_entries

_POSITIONS, _ORIGINALS = "positions:", "originals:"


def overlap(
    first: Mapping[str, Entries], second: Mapping[str, Entries], model: nn.Module | None = None
) -> dict[str, int]:
    """How many entries of each parameter both patches touch, by the first one's names.

    Raises:
        KeyError: the model has not all parameters.
        ValueError: one of its parameters cannot be patched.
    """

    def owners(patch: Mapping[str, Entries]) -> dict[str, Hashable]:
        """What each name means."""
        if model is None:
            return {name: name for name in patch}
        return {name: id(parameter) for name, parameter in resolve_entries(patch, model).items()}

    theirs: dict[Hashable, list[Tensor]] = {}
    for name, owner in owners(second).items():
        theirs.setdefault(owner, []).append(second[name].positions)
    counts = {
        name: int(torch.isin(first[name].positions, torch.cat(theirs[owner])).sum())
        for name, owner in owners(first).items()
        if owner in theirs
    }
    return {name: count for name, count in counts.items() if count}


def equal(first: Mapping[str, Entries], second: Mapping[str, Entries]) -> bool:
    """Whether both hold the same entries with the same values, bit by bit, whatever their provenance."""
    return set(first) == set(second) and all(
        first[name].shape == second[name].shape
        and torch.equal(first[name].positions, second[name].positions)
        and first[name].originals.dtype == second[name].originals.dtype
        and bool(same_bits(first[name].originals, second[name].originals).all())
        for name in first
    )


def union(first: Mapping[str, Entries], second: Mapping[str, Entries]) -> dict[str, Entries]:
    """All that is in one of the two."""
    _check_same_model(first, second, "unite")
    entries: dict[str, Entries] = {}
    for name in dict.fromkeys((*first, *second)):
        if name not in first or name not in second:
            entries[name] = (first if name in first else second)[name]
            continue
        mine, theirs = first[name], second[name]
        new = ~torch.isin(theirs.positions, mine.positions)
        positions, order = torch.cat([mine.positions, theirs.positions[new]]).sort()
        originals = torch.cat([mine.originals, theirs.originals[new]])[order]
        entries[name] = Entries(positions, originals, mine.shape, mine.checksum)
    return entries


def difference(first: Mapping[str, Entries], second: Mapping[str, Entries]) -> dict[str, Entries]:
    """What is in the first and not in the second."""
    _check_same_model(first, second, "subtract")
    entries = _entries_of(first, second, inside=False)
    if not entries:
        raise ValueError("nothing is left: the other patch touches all entries of this one")
    return entries


def intersection(first: Mapping[str, Entries], second: Mapping[str, Entries]) -> dict[str, Entries]:
    """What is in both."""
    _check_same_model(first, second, "intersect")
    entries = _entries_of(first, second, inside=True)
    if not entries:
        raise ValueError("nothing is left: the patches touch no entry in common")
    return entries


def _entries_of(first: Mapping[str, Entries], second: Mapping[str, Entries], inside: bool) -> dict[str, Entries]:
    """Of the first what is in the second, or what is not."""
    entries: dict[str, Entries] = {}
    for name, mine in first.items():
        theirs = second[name].positions if name in second else mine.positions[:0]
        left = torch.isin(mine.positions, theirs, invert=not inside)
        if bool(left.any()):
            entries[name] = Entries(mine.positions[left], mine.originals[left], mine.shape, mine.checksum)
    return entries


def merged(*positions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All flat positions of each name."""
    together: dict[str, list[Tensor]] = {}
    for some in positions:
        for name, flat in some.items():
            together.setdefault(name, []).append(flat)
    return {name: torch.unique(torch.cat(parts)) for name, parts in together.items()}


@contextmanager
def undone(patch: Mapping[str, Entries], model: nn.Module) -> Iterator[None]:
    """The model as it was before a patch was applied to it, for the time of the block.

    Raises:
        ValueError: the patch is not applied to the model.
    """
    if not applied_strength(patch, model):
        raise ValueError(
            "the patch to extend is not applied to the model: apply it, then collect the relevance of both sets"
        )
    parameters = resolve_entries(patch, model)
    places = {name: locate(parameter, patch[name].positions) for name, parameter in parameters.items()}
    applied = [(place, read(parameters[name], patch[name].positions)) for name, place in places.items()]
    write_together((place, patch[name].originals.to(parameters[name].dtype)) for name, place in places.items())
    try:
        yield
    finally:
        write_together(applied)


def with_positions(patch: Mapping[str, Entries], positions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Flat positions, and those of a patch after them."""
    both = dict(positions)
    for name in patch:
        both[name] = torch.cat([both[name], patch[name].positions]) if name in both else patch[name].positions
    return both


def renewed(patch: Mapping[str, Entries], model: nn.Module) -> dict[str, Entries]:
    """The same entries, with the values and checksums that a model has now; of a sharded one all processes must call this."""
    return {
        name: Entries(
            patch[name].positions, read(parameter, patch[name].positions), patch[name].shape, checksum(parameter)
        )
        for name, parameter in resolve_entries(patch, model).items()
    }


def combined_provenance(first: Mapping[str, Any], second: Mapping[str, Any], operation: str) -> dict[str, Any]:
    """Where a patch comes from that was made of two others, by what is known of them."""
    kept = ("model", "num_parameters", "fingerprint", "lrp_prune")
    named = [entry.get("behaviour", "") for entry in (first, second)]
    terms = [f"({name})" if "operation" in entry else name for name, entry in zip(named, (first, second), strict=True)]
    return {
        **{key: first[key] for key in kept if key in first},
        "behaviour": f" {operation} ".join(terms).strip(),
        "operation": operation,
        "of": [first, second],
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


def pack(patch: Mapping[str, Entries], provenance: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (positions in 4 bytes where they fit) and a description of plain values."""
    tensors: dict[str, Tensor] = {}
    shapes, checksums = {}, {}
    for name in patch:
        entry = patch[name]
        small = int(entry.positions[-1]) < 2**31
        tensors[_POSITIONS + name] = entry.positions.to(torch.int32 if small else torch.int64)
        tensors[_ORIGINALS + name] = entry.originals
        shapes[name], checksums[name] = list(entry.shape), entry.checksum
    return tensors, {"shapes": shapes, "checksums": checksums, "provenance": provenance}


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
