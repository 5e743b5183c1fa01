"""Data in three parts: relevance is collected on one, rules are chosen by the second, and the third judges what was chosen."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lrp_prune.models.batches import check_batches, samples_in, tensors

_logger = logging.getLogger("lrp_prune")
# More equal samples than this are no accident: it is the same data.
_ACCIDENT = 0.1


class Parts(NamedTuple):
    """Batches by what they are for.

    Args:
        reference: relevance is collected on these.
        selection: rules are chosen by the metric on these.
        test: what was chosen is judged by these, once.
    """

    reference: list[Any]
    selection: list[Any]
    test: list[Any]

    def digest(self) -> str:
        """What tells these data from others, in these parts."""
        digest = hashlib.sha256()
        for name, part in zip(self._fields, self, strict=True):
            digest.update(name.encode())
            for sample in sorted(_samples(part)):
                digest.update(sample)
        return digest.hexdigest()


def parted(
    batches: Iterable[Any] | Mapping[str, Iterable[Any]],
    seed: int = 0,
    shares: Sequence[float] = (0.25, 0.35, 0.4),
) -> Parts:
    """Part one set of batches by a seed; or take named parts, and verify that no sample is in two of them.

    Args:
        batches: batches, which are shuffled and dealt out whole, three at least; or those of ``"reference"``, ``"selection"`` and
            ``"test"``.
        seed: of the shuffling.
        shares: of the three parts.

    Raises:
        ValueError: for too few batches, other names, an empty part, or parts that have samples in common: the same objects, or
            more equal samples than chance explains. Fewer are told by the logger ``lrp_prune``.

    Example:
        >>> found = parted([torch.full((2, 1), float(number)) for number in range(8)])
        >>> [len(part) for part in found]
        [2, 3, 3]
    """
    if isinstance(batches, Mapping) and set(batches) & set(Parts._fields):
        found = _named(batches)
    else:
        check_batches(batches)
        found = _dealt(list(batches), seed, shares)
    _check_apart(found)
    return found


def _named(batches: Mapping[str, Iterable[Any]]) -> Parts:
    if set(batches) != set(Parts._fields):
        raise ValueError(f"parts must be {Parts._fields}, got {tuple(batches)}")
    for name, part in batches.items():
        check_batches(part, f"the part {name!r}")
    found = Parts(**{name: list(batches[name]) for name in Parts._fields})
    empty = [name for name, part in zip(Parts._fields, found, strict=True) if not part]
    if empty:
        raise ValueError(f"the part {empty[0]!r} has no batch")
    return found


def _dealt(batches: list[Any], seed: int, shares: Sequence[float]) -> Parts:
    if len(shares) != len(Parts._fields) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares must be three positive numbers of sum 1, for {Parts._fields}, got {tuple(shares)}")
    if len(batches) < len(Parts._fields):
        raise ValueError(
            f"batches are dealt out whole to {Parts._fields}, and there are only {len(batches)}: give smaller batches, or the "
            "parts by name, {'reference': [...], 'selection': [...], 'test': [...]}"
        )
    order = torch.randperm(len(batches), generator=torch.Generator("cpu").manual_seed(seed), device="cpu").tolist()
    first = min(max(round(shares[0] * len(order)), 1), len(order) - 2)
    second = min(max(round((shares[0] + shares[1]) * len(order)), first + 1), len(order) - 1)
    bounds = ((0, first), (first, second), (second, len(order)))
    return Parts(*([batches[place] for place in sorted(order[start:stop])] for start, stop in bounds))


def _check_apart(parts: Parts) -> None:
    named = dict(zip(Parts._fields, parts, strict=True))
    for one, other in (("reference", "selection"), ("reference", "test"), ("selection", "test")):
        ids = {id(batch) for batch in named[one]}
        if any(id(batch) in ids for batch in named[other]):
            raise ValueError(
                f"the parts {one!r} and {other!r} have a batch in common: what is judged must not be known before"
            )
        known, mine = set(_samples(named[one])), list(_samples(named[other]))
        equal = sum(sample in known for sample in mine)
        if equal > _ACCIDENT * len(mine):
            raise ValueError(
                f"{equal} of {len(mine)} samples of the part {other!r} are in {one!r} as well: what is judged must not be known "
                "before"
            )
        if equal:
            _logger.warning("%d of %d samples of the part %r equal some in %r", equal, len(mine), other, one)


def _samples(batches: Iterable[Any]) -> Iterator[bytes]:
    """A digest of each sample: of its row in every tensor that has one."""
    for batch in batches:
        count = samples_in(batch)
        rows = [tensor.detach().cpu() for tensor in tensors(batch) if tensor.dim() and len(tensor) == count]
        for number in range(count):
            digest = hashlib.sha256()
            for tensor in rows:
                row = tensor[number].contiguous().reshape(-1)
                digest.update(
                    f"{row.dtype}{tuple(tensor.shape[1:])}".encode() + row.view(torch.uint8).numpy().tobytes()
                )
            yield digest.digest()
