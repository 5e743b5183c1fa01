"""Masks and what they are put together with: other masks, the processes of a run, parameters."""

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lrp_prune.adapters import adapted_layers
from lrp_prune.distributed.sharding import Sharding
from lrp_prune.models.loaded import check_loaded
from lrp_prune.models.wording import listed
from lrp_prune.names import resolve, unwrap
from lrp_prune.selection import bits

_ADDED = ("lora_", "ia3_")

if TYPE_CHECKING:
    from lrp_prune.pruning.masks import Masks


def combined(
    first: "Masks", second: "Masks", function: Callable[[Tensor, Tensor], Tensor], action: str
) -> dict[str, Tensor]:
    """The packed masks that a function of two packed masks makes.

    Args:
        first, second: of the same parameters.
        function: of the bytes of both.
        action: what it does, in a word.

    Raises:
        ValueError: if names, shapes or how they are divided differ.
    """
    difference = sorted(set(first) ^ set(second))
    if difference:
        raise ValueError(f"cannot {action} masks of different parameters: {difference[0]!r} is in one of them only")
    for name in first:
        if first.shapes[name] != second.shapes[name]:
            raise ValueError(
                f"cannot {action} masks of {name!r}: shapes {first.shapes[name]} and {second.shapes[name]}"
            )
        if first.sharding(name) != second.sharding(name):
            raise ValueError(f"cannot {action} masks of {name!r}: divided among processes in different ways")
    return {name: function(first.bits(name), second.bits(name)) for name in first}


def parts(masks: "Masks", shardings: Mapping[str, Sharding]) -> tuple[dict[str, Tensor], dict[str, Sharding]]:
    """The packed masks of what is here when parameters are divided as given, and how those are that were not yet.

    Raises:
        ValueError: if they are divided in another way already, or are another model's.
    """
    for name in masks.shardings:
        if shardings.get(name, masks.shardings[name]) != masks.shardings[name]:
            raise ValueError(f"the mask of {name} is divided among processes in another way: use masks.gathered()")
    given = {name: entry for name, entry in shardings.items() if entry.mesh is not None}
    new = {name: entry for name, entry in given.items() if name in masks and name not in masks.shardings}
    for name, sharding in new.items():
        if sharding.shape != masks.shapes[name]:
            raise ValueError(
                f"{name} has shape {sharding.shape}, its mask {masks.shapes[name]}: is it another model's?"
            )
    packed = {name: bits.pack(new[name].part(masks.local(name))) if name in new else masks.bits(name) for name in masks}
    return packed, new


def of_adapter(name: str) -> bool:
    """Whether a parameter is one that PEFT adds to a layer, by its name."""
    return any(part.startswith(_ADDED) for part in name.split("."))


def without_adapters(masks: "Masks") -> "Masks":
    """The masks of the model's own parameters alone."""
    own = {name: masks.bits(name) for name in masks if not of_adapter(name)}
    return type(masks).from_bits(
        own, masks.shapes, granularity=masks.granularity, shardings=masks.shardings, unscored=masks.unscored,
        layouts=masks.layouts,
    )  # fmt: skip


def fitting(masks: "Masks", model: nn.Module) -> "Masks":
    """The masks; of a model that has no adapters, for they are merged, without what units had in them, which is told."""
    added = [name for name in masks if of_adapter(name)]
    if not added or masks.granularity == "weight" or adapted_layers(unwrap(model)):
        return masks
    warnings.warn(
        f"the model has no adapters (any more), so that masks of {listed(added, 2)} are left out",
        stacklevel=2,
    )
    return without_adapters(masks)


def masked_parameters(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, nn.Parameter]:
    """The parameters of a model that masks of these shapes can be applied to.

    Raises:
        KeyError: if the model has not all of them.
        ValueError: if a shape differs, or a parameter is not floating-point, or has no values here.
    """
    parameters = resolve(shapes, model)
    for name, parameter in parameters.items():
        _check_parameter(name, parameter, tuple(shapes[name]))
    check_loaded(parameters)
    return parameters


def _check_parameter(name: str, parameter: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(parameter.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(parameter.shape)}, its mask {shape}: was it made for another model?")
    if parameter.is_complex():
        raise ValueError(
            f"{name} has type {parameter.dtype}: complex weights are not pruned, leave it out of the masks"
        )
    if not parameter.is_floating_point():
        raise ValueError(
            f"{name} has type {parameter.dtype}: quantized weights cannot be set to zero, dequantize first"
        )
