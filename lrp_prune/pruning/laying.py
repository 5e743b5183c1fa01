"""Whether reference batches may be laid together: the model has to give for them what it gives for each of them alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrp_prune.models.batches import samples_in

Outputs = Callable[[Any], list[Tensor]]
"""From a batch to what a model, or a part of it, makes of it."""


def gives_the_same(both: Any, first: Any, second: Any, outputs: Outputs) -> bool:
    """Whether two batches laid together give what each of them gives alone, one below the other.

    A model that takes batches of one size, or whose first dimension is another than that of samples, may also end in an error.
    """
    apart = outputs(first), outputs(second)
    try:
        together = outputs(both)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of any kind, and not one of the batches as they are
        return False
    return _alike(together, *apart, (samples_in(first), samples_in(second)))


def _alike(both: list[Tensor], first: list[Tensor], second: list[Tensor], samples: tuple[int, int]) -> bool:
    """Whether outputs of two batches are those of each, one below the other or in another order of rows.

    What is the same for any number of samples, as a bias of positions, may be among them; a number may be a sum or a mean.
    """
    if not len(both) == len(first) == len(second):
        return False
    of_samples = 0
    for together, above, below in zip(both, first, second, strict=True):
        if together.dim() == above.dim() == below.dim() == 0:
            mean = (above * samples[0] + below * samples[1]) / sum(samples)
            if not _close(together, above + below) and not _close(together, mean):
                return False
        elif together.shape == above.shape == below.shape:
            if not _close(together, above) or not _close(together, below):
                return False
            continue
        elif not _has_rows_of(together, above, below):
            return False
        of_samples += 1
    return of_samples > 0


def _has_rows_of(together: Tensor, above: Tensor, below: Tensor) -> bool:
    """Whether rows are those of two others, in their order or in another, as steps of several sequences are packed."""
    if 0 in (above.dim(), below.dim()) or together.shape != (len(above) + len(below), *above.shape[1:]):
        return False
    apart = torch.cat([above, below])
    sums = ((rows.sum(0), rows.square().sum(0)) for rows in (together, apart))
    return _close(together, apart) or all(_close(ours, theirs) for ours, theirs in zip(*sums, strict=True))


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= _precision(expected) ** 0.5 * expected.norm())


def _precision(outputs: Tensor) -> float:
    """Of what outputs were computed in."""
    kind = outputs.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else outputs.dtype
    return torch.finfo(dtype).eps
