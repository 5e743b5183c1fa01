"""A model with masks applied until they are taken back: the values that they zero are kept beside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lrp_prune.distributed.sharding import local_part
from lrp_prune.pruning.masking import fitting, masked_parameters
from lrp_prune.pruning.masks import Masks


def values_under(model: nn.Module, masks: Masks) -> Callable[[], None]:
    """What puts back the values that masks are going to zero, bit for bit; to be asked for before they are applied.

    Of a model that is divided among processes each keeps the values of its own part.

    Raises:
        KeyError: if the model has not all parameters.
        ValueError: if a shape differs or a parameter is not floating-point.

    Example:
        >>> model, masks = nn.Linear(2, 1, bias=False), Masks({"weight": torch.tensor([[True, False]])})
        >>> before = model.weight.detach().clone()
        >>> undo = values_under(model, masks)
        >>> masks.apply_(model)
        >>> model.weight[0, 1].item()
        0.0
        >>> undo()
        >>> torch.equal(model.weight, before)
        True
    """
    masks = fitting(masks, model)
    values = {
        name: local_part(parameter)[~masks.part(name, parameter)]
        for name, parameter in masked_parameters(model, masks.shapes).items()
    }

    def undo() -> None:
        with torch.no_grad():
            for name, parameter in masked_parameters(model, masks.shapes).items():
                local_part(parameter)[~masks.part(name, parameter)] = values[name]

    return undo


@contextmanager
def zeroed(model: nn.Module, masks: Masks) -> Iterator[None]:
    """The model as masks leave it, for the time of a context, whatever happens in it."""
    undo = values_under(model, masks)
    try:
        masks.apply_(model)
        torch.clear_autocast_cache()  # which may have the weights as they were
        yield
    finally:
        undo()
        torch.clear_autocast_cache()
