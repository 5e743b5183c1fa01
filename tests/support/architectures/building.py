"""A tiny model of any type for any task, with random weights that are the same each time and biases that are zero."""

import math
import re
from functools import cache

import torch
import transformers
from torch import nn

from tests.support.architectures.mappings import auto_class, class_for
from tests.support.architectures.shrinking import shrunk

LARGEST = 12_000_000
"""A model that is to be tiny has fewer parameters, else something in its configuration was not seen to be a size."""


class NotTinyError(ValueError):
    """The generator has left something large."""


def tiny_config(name: str, mapping: str | None = None) -> transformers.PreTrainedConfig:
    """A small configuration of a type, for a task."""
    config = shrunk(transformers.CONFIG_MAPPING[name]())
    if mapping == "causal-lm" and getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    if mapping is not None:
        config.architectures = [class_for(mapping, config).__name__]
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    return config


def build(
    mapping: str,
    name: str,
    attention: str | None = None,
    *,
    biases: bool = False,
    dtype: torch.dtype = torch.float64,
    experts: str | None = "eager",
) -> nn.Module:
    """A tiny model in evaluation mode, in float64, with biases of zero, so that nothing absorbs relevance.

    Args:
        mapping: the task, one of :data:`~tests.support.architectures.mappings.MAPPINGS`.
        name: the type, as transformers calls it.
        attention: ``"eager"``, ``"sdpa"``, or None for the model's own choice.
        biases: whether there are any that are not zero.
        dtype: of the weights.
        experts: the implementation of experts; all but ``"eager"`` are for single precision. None for the model's own choice.

    Raises:
        NotTinyError: if it would have more than :data:`LARGEST` parameters.
    """
    chosen = {"attn_implementation": attention, "experts_implementation": experts}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    size = _size(mapping, name)
    if size > LARGEST:
        raise NotTinyError(f"{name} for {mapping} has {size:,} parameters")
    torch.manual_seed(0)
    model = _made(mapping, tiny_config(name, mapping), **chosen)
    return randomized(model, biases).eval().to(dtype)


@cache
def _size(mapping: str, name: str) -> int:
    """How many parameters there would be, without making them."""
    with torch.device("meta"):
        return number_of_parameters(_made(mapping, tiny_config(name, mapping)))


def _made(mapping: str, config: transformers.PreTrainedConfig, **chosen: str) -> nn.Module:
    """A model of a configuration; where its class takes a part of that (a decoder's), of the part."""
    kind = class_for(mapping, config)
    parts = [name for name, part in config.sub_configs.items() if part is kind.config_class and name != "text_config"]
    if parts and not isinstance(config, kind.config_class):  # transformers itself takes none but the text's
        part = getattr(config, parts[0])
        part.architectures = [kind.__name__]
        made: nn.Module = kind._from_config(part, **chosen)
        return made
    model: nn.Module = auto_class(mapping).from_config(config, **chosen)
    return model


def randomized(model: nn.Module, biases: bool = False) -> nn.Module:
    """Weights of a size that keeps activations as large as they are, scales that differ, and no biases unless they are asked for.

    What models begin with is too small, or zero, for differences to be seen.
    """
    generator = torch.Generator().manual_seed(1)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if is_bias(name):
                parameter.copy_(0.3 * noise if biases else torch.zeros_like(noise))
                continue
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


def attentions(mapping: str, name: str) -> list[str]:
    """The implementations of attention that a type can be built with; eager where there is no attention as well."""
    config = tiny_config(name, mapping)
    if not getattr(class_for(mapping, config), "_supports_sdpa", False):
        return ["eager"]
    try:
        with torch.device("meta"):
            model = _made(mapping, config, attn_implementation="sdpa")
    except (ValueError, ImportError):
        return ["eager"]
    return ["eager", "sdpa"] if model.config._attn_implementation == "sdpa" else ["eager"]


def number_of_parameters(model: nn.Module) -> int:
    """How many there are, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
