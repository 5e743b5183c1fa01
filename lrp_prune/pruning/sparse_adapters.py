"""Adapters that are zero where the weights that they are added to are pruned: what is trained is what is merged."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrp_prune.adapters import adapted_layers
from lrp_prune.distributed.sharding import is_sharded
from lrp_prune.names import resolve, unwrap
from lrp_prune.pruning.masks import Masks

_SCALING = "IA3Layer"
"""Adapters that scale: a zero stays one."""


class MaskedDelta:
    r"""How a layer with a LoRA adapter uses and merges it: as :math:`M \odot s B A` in place of :math:`s B A`.

    It stands in PEFT's table of variants of a layer, where DoRA's is, for instance, so that ``merge``, ``unmerge`` and
    ``merge_and_unload`` go by it as well. No parameter is added or renamed.

    Args:
        kept: bool, of the weight's shape, True where it is kept.
    """

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept

    def supports_lora_conversion(self) -> bool:
        """It is no product of two small matrices."""
        return False

    def init(self, module: nn.Module, **_: Any) -> None:
        """Nothing has to be made."""

    def delta_of(self, module: Any, adapter: str) -> Tensor:
        """What the adapter adds to the weight, in the weight's shape."""
        delta: Tensor = module.get_delta_weight(adapter)
        if self.kept.device != delta.device:
            self.kept = self.kept.to(delta.device)
        return delta.masked_fill(~self.kept, 0.0)

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The merged weight, as a new tensor."""
        return orig_weight + self.delta_of(module, active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Merge in place."""
        orig_weight.data += self.delta_of(module, active_adapter).to(orig_weight.dtype)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight without the adapter."""
        return orig_weight.data - self.delta_of(module, active_adapter).to(orig_weight.dtype)

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """What the layer gives with its adapter.

        Args:
            module: the layer.
            active_adapter: the adapter's name.
            x: what the layer gets.
            result: what it gives without.
        """
        base, delta = module.get_base_layer(), self.delta_of(module, active_adapter)
        added, bias = getattr(module, "lora_B", {}), None
        if active_adapter in added and getattr(added[active_adapter], "bias", None) is not None:
            bias = added[active_adapter].bias * module.scaling[active_adapter]
        if isinstance(base, nn.Embedding):
            scale = module._get_embed_scale() if hasattr(module, "_get_embed_scale") else None
            looked_up: Tensor = module._embed(x, delta)
            return result + (looked_up if scale is None else looked_up * scale.to(looked_up.dtype))
        x = module.lora_dropout[active_adapter](x)
        if isinstance(base, nn.modules.conv._ConvNd):
            return result + base._conv_forward(x, delta, bias)
        if isinstance(base, nn.Linear):
            return result + F.linear(x, delta, bias)
        return result + (x @ delta if bias is None else x @ delta + bias)  # transformers' Conv1D


def mask_adapters(model: nn.Module, masks: Masks) -> None:
    r"""Let LoRA adapters be zero where masks prune the weights that they are added to, in training and when they are merged.

    A layer then gives :math:`(W + M \odot s B A) \, x` in place of :math:`(W + s B A) \, x`, as SparsePEFT does (arXiv
    2410.03750), so that the trained model is the merged one, and ``merge_and_unload()`` keeps each zero. :math:`A` and :math:`B`
    are the parameters, and their files, as before. A training pays for it: the product :math:`B A` is computed in each forward
    and kept for the backward pass, as large as the weight; a step takes about twice the time of training the layer itself.

    :class:`~lrp_prune.callbacks.RelevancePruning` does this by itself. A model of which an adapter is loaded anew adds all of it
    until this is called again, so merge before you save, or call this after loading.

    Args:
        model: with adapters that PEFT has made, in a ``PeftModel`` or not.
        masks: of the model with its adapters or without, which have the same names; called again, they replace those before.

    Raises:
        ValueError: a weight of the masks has an adapter that is not simply added to it (DoRA), of another kind than LoRA, that is
            merged already, or that is divided among processes; or none has an adapter. Nothing has changed then.

    Example::

        masks = lrp_prune.prune(peft_model, batches, sparsity=0.5)
        lrp_prune.mask_adapters(peft_model, masks)
        trainer.fit(...)  # trains the adapters
        model = peft_model.merge_and_unload()
    """
    if not mask_adapters_of(model, masks):
        raise ValueError("no weight of the masks has an adapter: there is nothing to mask")


def mask_adapters_of(model: nn.Module, masks: Masks) -> list[str]:
    """:func:`mask_adapters` of a model that may have none; the names of the weights whose adapters are masked."""
    found = check_adapters(model, {name: masks.shapes[name] for name in masks if masks.pruned_in(name)})
    for name, layer in found.items():
        weight = layer.get_base_layer().weight
        for adapter in layer.scaling:
            layer.lora_variant[adapter] = MaskedDelta(masks.part(name, weight))
    return list(found)


def check_adapters(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Refuse adapters that could not be masked if these weights were pruned; the layers of the others, by the weights' names."""
    found = dict(_layers(model, shapes))
    for name, layer in found.items():
        reason = _why_not(layer, shapes[name])
        if reason:
            raise ValueError(f"the adapter of {name} cannot be masked: it {reason}; leave the weight out by exclude=")
    return found


def unmask_adapters(model: nn.Module) -> None:
    """Take back what :func:`mask_adapters` did: adapters are added to all of their weights again."""
    for layer in _with_variants(model):
        for name in [name for name, variant in layer.lora_variant.items() if isinstance(variant, MaskedDelta)]:
            del layer.lora_variant[name]


@contextmanager
def whole_adapters(model: nn.Module) -> Iterator[None]:
    """Adapters as they are without masks, for the time of a context."""
    layers = _with_variants(model)
    before = [dict(layer.lora_variant) for layer in layers]
    try:
        unmask_adapters(model)
        yield
    finally:
        for layer, variants in zip(layers, before, strict=True):
            layer.lora_variant.update(variants)


def _with_variants(model: nn.Module) -> list[Any]:
    return [layer for layer in adapted_layers(unwrap(model)).values() if hasattr(layer, "lora_variant")]


def _layers(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The layers with an adapter on one of these weights, each by the weight's name."""
    model = unwrap(model)
    owner: dict[int, Any] = {}
    for layer in adapted_layers(model).values():
        if _SCALING not in {entry.__name__ for entry in type(layer).__mro__}:
            owner.update((id(parameter), layer) for parameter in layer.base_layer.parameters())  # type: ignore[union-attr]
    for name, parameter in resolve(names, model).items() if owner else ():
        if id(parameter) in owner:
            yield name, owner[id(parameter)]


def _why_not(layer: Any, shape: tuple[int, ...]) -> str | None:
    kinds = {entry.__name__ for entry in type(layer).__mro__}
    if "LoraLayer" not in kinds or not hasattr(layer, "lora_variant"):
        return f"is of another kind than LoRA ({type(layer).__name__})"
    other = [entry for entry in layer.lora_variant.values() if not isinstance(entry, MaskedDelta)]
    if other:
        return f"is not simply added ({type(other[0]).__name__})"
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd) and type(base).__name__ != "Conv1D":
        return f"is of a {type(base).__name__}, of which it is added to several weights"
    if getattr(base, "groups", 1) > 1:
        return "is of a convolution in groups, which PEFT does not merge"
    if getattr(layer, "merged", False):
        return "is merged already: unmerge it first"
    weight = getattr(base, "weight", None)
    if not isinstance(weight, nn.Parameter) or tuple(weight.shape) != shape:
        return "is not added to a weight of the mask's shape"
    if any(is_sharded(parameter) for parameter in layer.parameters()):
        return "is divided among processes"
    if not torch.is_floating_point(weight):
        return "is added to a quantized weight"
    return None
