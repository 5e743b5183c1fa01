"""All weights and statistics of a model kept beside it, to be put back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lrp_prune.distributed.sharding import at_rest, local_part


@contextmanager
def restored(model: nn.Module, always: bool) -> Iterator[Callable[[], None]]:
    """Yields what puts parameters and buffers back, bit for bit, as they are now; they are kept in the memory of the CPU.

    Args:
        model: the model.
        always: whether that is done at the end, too; else only if something fails.
    """
    at_rest(model)
    tensors = [local_part(tensor) for tensor in (*model.parameters(), *model.buffers())]
    values = [tensor.detach().to("cpu", copy=True) for tensor in tensors]

    def restore() -> None:
        at_rest(model)
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)

    try:
        yield restore
    except BaseException:
        restore()
        raise
    if always:
        restore()
