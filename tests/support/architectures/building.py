"""A tiny model of any type for any task, with random weights that are the same each time and biases that are zero."""

import math
import re
from typing import Any

import torch
import transformers
from torch import nn

from tests.support.architectures.mappings import auto_class
from tests.support.architectures.shrinking import shrunk

LARGEST = 3_000_000
"""A model that is to be tiny has fewer parameters, else something in its configuration was not seen to be a size."""


class NotTinyError(ValueError):
    """The generator has left something large."""


def tiny_config(name: str, mapping: str | None = None) -> transformers.PreTrainedConfig:
    """A small configuration of a type, for a task."""
    config = shrunk(transformers.CONFIG_MAPPING[name]())
    if mapping == "causal-lm" and getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    return config


def build(mapping: str, name: str, attention: str | None = None) -> nn.Module:
    """A tiny model in evaluation mode, in float64, with biases of zero, so that nothing absorbs relevance.

    Args:
        mapping: the task, one of :data:`~tests.support.architectures.mappings.MAPPINGS`.
        name: the type, as transformers calls it.
        attention: ``"eager"``, ``"sdpa"``, or None for the model's own choice.

    Raises:
        NotTinyError: if it would have more than :data:`LARGEST` parameters.
    """
    config = tiny_config(name, mapping)
    chosen = {} if attention is None else {"attn_implementation": attention}
    chosen["experts_implementation"] = "eager"  # the others have no double precision
    auto = auto_class(mapping)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config, **chosen).parameters())
    if size > LARGEST:
        raise NotTinyError(f"{name} for {mapping} has {size:,} parameters")
    torch.manual_seed(0)
    model: nn.Module = auto.from_config(tiny_config(name, mapping), **chosen)
    return randomized(model).eval().double()


def randomized(model: nn.Module) -> nn.Module:
    """Weights of a size that keeps activations as large as they are, scales that differ, and no biases.

    What models begin with is too small, or zero, for differences to be seen.
    """
    generator = torch.Generator().manual_seed(1)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_bias(name):
                parameter.zero_()
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            else:
                inputs = math.prod(parameter.shape[1:]) if parameter.dim() > 3 else parameter.shape[-1]
                parameter.copy_(noise * (0.5 if id(parameter) in tables else inputs**-0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def is_bias(name: str) -> bool:
    """Whether a parameter is what a layer adds, by its own name: ``bias``, ``in_proj_bias``, ``up_proj_bias``, ``bias_hh_l0``."""
    return bool(re.fullmatch(r"(\w+_)?bias(_[hi]h_l\d+\w*)?", name.rpartition(".")[2]))


def attentions(mapping: str, name: str) -> list[str | None]:
    """The implementations of attention that a type can be built with; one None where there is no choice."""
    found: list[str | None] = []
    for attention in ("eager", "sdpa"):
        try:
            with torch.device("meta"):
                model = auto_class(mapping).from_config(tiny_config(name, mapping), attn_implementation=attention)
        except (ValueError, ImportError):
            continue
        if getattr(model.config, "_attn_implementation", attention) == attention:
            found.append(attention)
    return found or [None]


def number_of_parameters(model: nn.Module) -> int:
    """How many there are, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


__all__: list[Any] = [
    "LARGEST", "NotTinyError", "attentions", "build", "is_bias", "number_of_parameters", "randomized", "tiny_config",
]  # fmt: skip
