"""Weights and statistics of a model kept beside it, to be put back."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lrp_prune.distributed.sharding import at_rest, local_part


def remembered(model: nn.Module, tensors: Iterable[Tensor] | None = None) -> Callable[[], None]:
    """What puts tensors of a model back, bit for bit, as they are now; they are kept in the memory of the CPU.

    Args:
        model: the model.
        tensors: which; None for all parameters and buffers.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> before, restore = model.weight.detach().clone(), remembered(model, [model.weight])
        >>> _ = model.weight.data.zero_()
        >>> restore()
        >>> torch.equal(model.weight, before)
        True
    """
    at_rest(model)
    here = [local_part(tensor) for tensor in ((*model.parameters(), *model.buffers()) if tensors is None else tensors)]
    values = [tensor.detach().to("cpu", copy=True) for tensor in here]

    def restore() -> None:
        at_rest(model)
        with torch.no_grad():
            for tensor, value in zip(here, values, strict=True):
                tensor.copy_(value)

    return restore


@contextmanager
def restored(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Yields what puts all parameters and buffers back as they are now, see :func:`remembered`; done at the end in any case."""
    restore = remembered(model)
    try:
        yield restore
    finally:
        restore()


@contextmanager
def undone_on_error() -> Iterator[list[Callable[[], None]]]:
    """Yields a list of what puts values back, which is done in reverse if something fails."""
    undo: list[Callable[[], None]] = []
    try:
        yield undo
    except BaseException:
        for entry in reversed(undo):
            entry()
        raise
