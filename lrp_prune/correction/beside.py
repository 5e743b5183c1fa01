"""What a patch does besides what it is for: a suite before and after, beside as many random entries."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lrp_prune.arguments import check_integer
from lrp_prune.correction.conditional import ConditionalPatch
from lrp_prune.correction.entries import check_strength
from lrp_prune.correction.patch import Patch
from lrp_prune.effects import SideEffects, Suite, side_effects

RANDOM = "random weights"


def side_effects_of(
    patch: Patch,
    model: nn.Module,
    suite: Suite | Mapping[str, Any],
    strength: float | None = None,
    *,
    allowed: Mapping[str, float] | float | None = None,
    random: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> SideEffects:
    """Measure a suite on a model without and with a patch, and write what is found into the patch's description.

    The model comes out bit for bit as it went in. Beside the patch are random ones: as many entries of each parameter, at the
    same strength. ``patch.provenance["side_effects"]`` has the lines, the strength, the limits and the verdict; nothing is
    refused here, :meth:`SideEffects.check` does that.

    Args:
        patch: not applied to the model.
        model: what it was made for.
        suite: see :class:`lrp_prune.metrics.Suite`.
        strength: at which it is applied; that of its description if not given, else 1.
        allowed: limits by name or pattern, kept in the description with the verdict; those of the suite if not given.
        random: how many random patches.
        seed: of these, and of the intervals.
        progress: show a progress bar.

    Raises:
        ValueError: if the patch is applied already or of another model, for an argument that is out of range, or a limit of what
            is not measured.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        >>> patch = Patch.from_positions(model, {"1.weight": torch.arange(6)})
        >>> found = side_effects_of(patch, model, {"any": torch.ones(3, 4, dtype=torch.int64)}, random=2, progress=False)
        >>> [len(values) for values in found["any"].beside.values()], patch.provenance["side_effects"]["strength"]
        ([2], 1.0)
    """
    chosen = suite if isinstance(suite, Suite) else Suite(suite)
    at = float(patch.provenance.get("strength", 1.0)) if strength is None else strength
    check_strength(at)
    limits = chosen.limits(chosen.allowed if allowed is None else allowed)
    check_integer("random", random, 0)
    patch.verify(model)
    states = [partial(applied, random_like(patch, model, seed + number), model, at) for number in range(random)]
    found = side_effects(
        model,
        partial(applied, patch, model, at),
        chosen,
        beside={RANDOM: states} if states else None,
        seed=seed,
        progress=progress,
    )
    describe(patch, found, at, limits)
    return found


def describe(patch: Patch, effects: SideEffects, strength: float, limits: Mapping[str, float]) -> None:
    """Write side effects, the limits that they were held to and the verdict into a patch's description."""
    verdict = effects.verdict(limits, named(patch))
    patch.provenance["side_effects"] = {
        **effects.to_dict(),
        "strength": strength,
        "allowed": dict(limits),
        "within": not effects.beyond(limits),
        "verdict": verdict,
    }


def named(patch: Patch) -> str:
    """What a patch is called in a sentence."""
    return f"the patch against {patch.behaviour!r}" if patch.behaviour else "the patch"


@contextmanager
def applied(patch: Patch, model: nn.Module, strength: float = 1.0) -> Iterator[nn.Module]:
    """The model with a patch, for the time being; whole parameters are not compared, as :meth:`Patch.verify` does."""
    patch.apply_(model, strength, strict=False)
    try:
        yield model
    finally:
        patch.revert_(model, strict=False)


def random_like(patch: Patch, model: nn.Module, seed: int = 0) -> Patch:
    """A patch of as many entries of each parameter, drawn from all of its entries; under the same condition, if there is one.

    Example:
        >>> model = nn.Linear(8, 8)
        >>> patch = Patch.from_positions(model, {"weight": torch.arange(5)})
        >>> random_like(patch, model).num_entries
        5
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    positions = {}
    for name, entry in patch.items():
        size, count = int(torch.Size(entry.shape).numel()), len(entry.positions)
        positions[name] = _drawn(size, count, generator)
    drawn = Patch.from_positions(
        model, positions, behaviour=f"none: random entries, as many as {named(patch)} has", seed=seed
    )
    return ConditionalPatch(drawn, patch.condition) if isinstance(patch, ConditionalPatch) else drawn


def _drawn(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` different positions of ``size``; without a permutation of all of them where few are drawn."""
    if 3 * count > size:
        return torch.randperm(size, generator=generator, device="cpu")[:count]
    found: set[int] = set()
    while len(found) < count:
        found.update(torch.randint(size, (count - len(found),), generator=generator, device="cpu").tolist())
    return torch.tensor(sorted(found), device="cpu")
