"""Weights and statistics of a model kept beside it, to be put back."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lrp_prune.distributed.sharding import at_rest, local_part


def remembered(model: nn.Module, tensors: Iterable[Tensor]) -> Callable[[], None]:
    """What puts some tensors of a model back, bit for bit, as they are now; they are kept in the memory of the CPU.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> before, restore = model.weight.detach().clone(), remembered(model, [model.weight])
        >>> _ = model.weight.data.zero_()
        >>> restore()
        >>> torch.equal(model.weight, before)
        True
    """
    at_rest(model)
    here = [local_part(tensor) for tensor in tensors]
    values = [tensor.detach().to("cpu", copy=True) for tensor in here]

    def restore() -> None:
        at_rest(model)
        with torch.no_grad():
            for tensor, value in zip(here, values, strict=True):
                tensor.copy_(value)

    return restore


@contextmanager
def restored(model: nn.Module, always: bool) -> Iterator[Callable[[], None]]:
    """Yields what puts all parameters and buffers back as they are now, see :func:`remembered`.

    Args:
        model: the model.
        always: whether that is done at the end, too; else only if something fails.
    """
    restore = remembered(model, (*model.parameters(), *model.buffers()))
    try:
        yield restore
    except BaseException:
        restore()
        raise
    if always:
        restore()
