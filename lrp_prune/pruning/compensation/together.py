"""Small reference batches laid together: what a run costs beside its arithmetic is paid once for several."""

from typing import Any

from torch import Tensor

from lrp_prune.engine.uses import Product
from lrp_prune.models.batches import in_groups, laid_together
from lrp_prune.pruning.laying import Outputs, gives_the_same
from lrp_prune.pruning.pairs import Part, PlacedUses
from lrp_prune.pruning.processes import Processes

ENTRIES = 1 << 22
"""Entries of the largest output of a layer up to which batches are laid together; beyond, there is nothing to save."""

_ALONE = Processes(None)


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
    return laid if all(in_step.gathered(gives_the_same(both, batches[0], batches[1], outputs))) else batches


def laid_number(largest: int, batches: int) -> int:
    """How many batches are run as one, where they fit."""
    return max(1, min(ENTRIES // max(largest, 1), batches))


class Sized(PlacedUses):
    """Also notes how large outputs of layers are."""

    largest = 0

    def _seen(self, part: Part, found: Product, result: Tensor) -> None:
        super()._seen(part, found, result)
        self.largest = max(self.largest, result.numel())
