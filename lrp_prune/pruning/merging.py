"""Adapters merged under masks: what was pruned beside an adapter is zero in the model that is kept."""

import torch
from torch import nn

from lrp_prune.adapters import adapted_layers, adapter_parameters, adapting_models
from lrp_prune.names import resolve, unwrap
from lrp_prune.pruning.masking import without_adapters
from lrp_prune.pruning.masks import Masks


def merge_adapters(model: nn.Module, masks: Masks) -> nn.Module:
    r"""Merge PEFT's adapters into the weights, keep what the masks prune at zero, and return the model without adapters.

    Of a weight :math:`W` with an adapter, :math:`W + s B A` is used. Pruning it sets entries of :math:`W` to zero, and until
    the adapter is merged the forward still adds all of :math:`s B A`, also at these entries; ``merge_and_unload`` alone would
    write it there. Here it becomes :math:`M \odot (W + s B A)`. So the model that is returned is not the one that was trained:
    the adapters' part at pruned entries is gone. Measure it, and train on if need be.

    Args:
        model: a ``PeftModel``. PEFT merges in place: it is used up.
        masks: of the model with its adapters or without, which have the same names.

    Returns:
        The model inside, an ordinary one again, its zeros verified.

    Raises:
        TypeError: if the model is no ``PeftModel``.
        KeyError, ValueError: if the masks do not fit, or are of adapters; nothing has changed then.
        RuntimeError: if an entry is not zero afterwards.

    Example::

        masks = lrp_prune.prune(peft_model, batches, sparsity=0.5)  # the weights inside, scored with their adapters
        trainer.fit(...)  # trains the adapters
        model = lrp_prune.merge_adapters(peft_model, masks)
        model.save_pretrained("pruned")
    """
    model = unwrap(model)
    merge = getattr(model, "merge_and_unload", None)
    if model not in adapting_models(model).values() or not callable(merge):
        inside = [name for name, found in adapting_models(model).items() if found is not model]
        where = f": it is at {inside[0]!r}" if inside else ""
        raise TypeError(f"adapters are merged in a PeftModel, got {type(model).__name__}{where}")
    if masks.granularity != "weight":
        # A unit's part of the weights is zero as well, and what is added there is dropped.
        masks = without_adapters(masks)
    of_adapters = adapter_parameters(model)
    added = {id(entry) for name, entry in model.named_parameters(remove_duplicate=False) if name in of_adapters}
    for name, parameter in resolve(masks, model).items():
        if id(parameter) in added:
            raise ValueError(
                f"{name} belongs to an adapter: zeros in it are none in the sum that it becomes a part of, so that there is "
                "nothing to keep; use the model's merge_and_unload()"
            )
        if tuple(parameter.shape) != masks.shapes[name]:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, its mask {masks.shapes[name]}")
    merged: nn.Module = merge(safe_merge=True)
    masks.apply_(merged)
    for name, parameter in resolve(masks, merged).items():
        if bool(torch.count_nonzero(parameter.detach()[~masks.part(name, parameter)])):
            raise RuntimeError(f"{name} is not zero where it was pruned, after its adapter was merged")
    if adapted_layers(merged):
        raise RuntimeError(f"{next(iter(adapted_layers(merged)))} still has an adapter after merging")
    return merged
