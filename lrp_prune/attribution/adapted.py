"""The weights that adapters (PEFT) are added to: what is used is the sum, as it will be after merging."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lrp_prune.adapters import adapted_layers
from lrp_prune.distributed.sharding import is_sharded
from lrp_prune.names import naming, unwrap
from lrp_prune.relevance.unscored import DIVIDED

_SCALING = "IA3Layer"
"""Adapters that scale a layer's inputs or outputs: a zero stays one, and relevance at the layer is that of the merged weight."""


def adapted_weights(model: nn.Module) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    r"""Of each adapted weight the values that are used, :math:`W + \sum s B A` over the adapters that are active, or why not.

    At an adapted layer :math:`y = W x + s B A x` the activation and the propagated gradient are those of the merged layer, so
    that its relevance is the one at :math:`W`, with the factor :math:`W + s B A` for :math:`W`.

    Returns:
        Canonical name -> computes the merged weight; canonical name -> why it cannot be scored.
    """
    used: dict[str, Callable[[], Tensor]] = {}
    refused: dict[str, str] = {}
    model, canonical = unwrap(model), naming(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path, layer in adapted_layers(model).items():
        base = getattr(layer, "base_layer", None)
        bases = {entry.__name__ for entry in type(layer).__mro__}
        if not isinstance(base, nn.Module) or _SCALING in bases or _is_off(layer):
            continue
        below = f"{path}.base_layer." if path else "base_layer."
        weights = [name for name, entry in parameters.items() if name.startswith(below) and entry.dim() >= 2]
        reason = None if "LoraLayer" in bases else f"has an adapter of another kind than LoRA ({type(layer).__name__})"
        reason = reason or _unknown(layer, base, [parameters[name] for name in weights])
        if reason is not None:
            refused.update(dict.fromkeys(map(canonical, weights), reason))
            continue
        for name in weights:
            used[canonical(name)] = _merged(layer, parameters[name])
    return used, refused


def _is_off(layer: nn.Module) -> bool:
    """Whether the layer's weight is used as it is: without an adapter, or with one that was added to it already."""
    return bool(getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False) or not _active(layer))


def _active(layer: nn.Module) -> list[str]:
    holders = [getattr(layer, name, None) or {} for name in getattr(layer, "adapter_layer_names", ())]
    return [name for name in getattr(layer, "active_adapters", ()) if any(name in holder for holder in holders)]


def _unknown(layer: nn.Module, base: nn.Module, weights: list[nn.Parameter]) -> str | None:
    variants = getattr(layer, "lora_variant", None) or {}
    rescaled = [
        type(variants[name]).__name__
        for name in _active(layer)
        if name in variants and not hasattr(variants[name], "delta_of")
    ]
    if rescaled:
        return f"has an adapter that is not simply added to it ({', '.join(rescaled)})"
    if len(weights) != 1 or not isinstance(getattr(base, "weight", None), nn.Parameter):
        return f"is one of several weights of an adapted {type(base).__name__}"
    if any(is_sharded(parameter) for parameter in layer.parameters()):
        return DIVIDED
    return None


def _merged(layer: nn.Module, weight: nn.Parameter) -> Callable[[], Tensor]:
    def values() -> Tensor:
        result = weight.detach().clone()
        variants: Any = getattr(layer, "lora_variant", None) or {}
        for name in _active(layer):
            # Of an adapter under masks (lrp_prune.mask_adapters) what is left of it.
            masked = name in variants
            delta = variants[name].delta_of(layer, name) if masked else layer.get_delta_weight(name)  # type: ignore[operator]
            result += delta.detach().to(result)
        return result

    return values
