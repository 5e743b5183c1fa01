"""A model with masks applied until they are taken back: the values that they zero are kept beside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lrp_prune.distributed.sharding import local_part
from lrp_prune.names import resolve
from lrp_prune.pruning.masks import Masks


def zero_(model: nn.Module, masks: Masks) -> Callable[[], None]:
    """Apply masks to a model, and return what puts back the values that they zeroed, bit for bit.

    Of a model that is divided among processes each keeps the values of its own part.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> before = model.weight.detach().clone()
        >>> undo = zero_(model, Masks({"weight": torch.tensor([[True, False]])}))
        >>> model.weight[0, 1].item()
        0.0
        >>> undo()
        >>> torch.equal(model.weight, before)
        True
    """
    values = {
        name: local_part(parameter)[~masks.part(name, parameter)] for name, parameter in resolve(masks, model).items()
    }
    masks.apply_(model)

    def undo() -> None:
        with torch.no_grad():
            for name, parameter in resolve(masks, model).items():
                local_part(parameter)[~masks.part(name, parameter)] = values[name]

    return undo


@contextmanager
def zeroed(model: nn.Module, masks: Masks) -> Iterator[None]:
    """The model as masks leave it, for the time of a context, whatever happens in it."""
    undo = zero_(model, masks)
    torch.clear_autocast_cache()  # which may have the weights as they were
    try:
        yield
    finally:
        undo()
        torch.clear_autocast_cache()
