"""Small reference batches laid together: what a run costs beside its arithmetic is paid once for several."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrp_prune.engine.uses import Product
from lrp_prune.models.batches import in_groups, laid_together, samples_in
from lrp_prune.pruning.pairs import Part, PlacedUses
from lrp_prune.pruning.processes import Processes

ENTRIES = 1 << 22
"""Entries of the largest output of a layer up to which batches are laid together; beyond, there is nothing to save."""

_ALONE = Processes(None)
Outputs = Callable[[Any], list[Tensor]]
"""From a batch to what the model, or the last of its stages, makes of it."""


def laid_in_few(batches: list[Any], largest: int, outputs: Outputs, processes: Processes = _ALONE) -> list[Any]:
    """The same samples in fewer batches, where outputs are the same to rounding.

    They are not where samples of a batch see each other (a batch normalization in training mode, time along the first
    dimension, losses that contrast samples): two batches, run alone and as one, show it.

    Args:
        batches: as they are.
        largest: entries of the largest output of a layer, of the first batch.
        outputs: runs the model, as far as it is used.
        processes: those that work together; where they run it in step, each has as many batches, before and afterwards.
    """
    in_step = processes if processes.in_step else _ALONE
    number = laid_number(max(in_step.gathered(largest)), len(batches))
    if number < 2:
        return batches
    both, laid = laid_together(*batches[:2]), [batch for batch, _ in in_groups(batches, number)]
    if len(set(in_step.gathered(0 if both is None else len(laid)))) > 1 or both is None:
        return batches
    alike = _alike(outputs(both), outputs(batches[0]), outputs(batches[1]), samples_in(batches[0]))
    return laid if all(in_step.gathered(alike)) else batches


def laid_number(largest: int, batches: int) -> int:
    """How many batches are run as one, where they fit."""
    return max(1, min(ENTRIES // max(largest, 1), batches))


def _alike(both: list[Tensor], first: list[Tensor], second: list[Tensor], samples: int) -> bool:
    """Whether outputs of two batches are those of each, one below the other.

    What is the same for any number of samples, as a bias of positions, may be among them.
    """
    if not len(both) == len(first) == len(second):
        return False
    below_each_other = 0
    for together, above, below in zip(both, first, second, strict=True):
        if together.shape == above.shape == below.shape:
            if not _close(together, above) or not _close(together, below):
                return False
            continue
        if above.dim() == 0 or len(above) != samples or together.shape != (len(above) + len(below), *above.shape[1:]):
            return False
        if not _close(together, torch.cat([above, below])):
            return False
        below_each_other += 1
    return below_each_other > 0


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= _precision(expected) ** 0.5 * expected.norm())


class Sized(PlacedUses):
    """Also notes how large outputs of layers are."""

    largest = 0

    def _seen(self, part: Part, found: Product, result: Tensor) -> None:
        super()._seen(part, found, result)
        self.largest = max(self.largest, result.numel())


def _precision(outputs: Tensor) -> float:
    """Of what outputs were computed in."""
    kind = outputs.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else outputs.dtype
    return torch.finfo(dtype).eps
