"""Backends of attention and experts, swapped for the time of a pass: where they hide what happens, or to compare them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from lrp_prune.walks import modules_of

_VISIBLE = ("eager", "sdpa", None)
_EXPERTS = "_experts_implementation_internal"
_LOADED_SO = ("deepgemm_megamoe",)
"""Ways to run experts that a model has its weights laid out for when it is loaded."""


@contextmanager
def traceable_attention(model: nn.Module) -> Iterator[None]:
    """Let Hugging Face models with flash or flex attention use ``sdpa``, or ``eager`` where they have no other."""
    with _attention(model, lambda name: name not in _VISIBLE, lambda module: getattr(module, "_supports_sdpa", False)):
        yield


@contextmanager
def traceable(model: nn.Module, experts: bool) -> Iterator[None]:
    """:func:`traceable_attention`, and :func:`experts_apart` where experts are to be told from each other."""
    with traceable_attention(model), experts_apart(model) if experts else nullcontext():
        yield


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[bool]:
    """Let Hugging Face models compute attention by products and a softmax; yields whether any of them did it otherwise."""
    with _attention(model, lambda name: name not in ("eager", None), lambda module: False) as swapped:
        yield swapped


@contextmanager
def experts_apart(model: nn.Module) -> Iterator[None]:
    """Let Hugging Face's mixtures run one expert after the other, each with its own tokens, and not all in one product."""
    configurations = {id(config): config for module in modules_of(model) if (config := vars(module).get("config"))}
    swapped = [
        config for config in configurations.values() if vars(config).get(_EXPERTS) not in (None, "eager", *_LOADED_SO)
    ]
    before = [(config, vars(config)[_EXPERTS]) for config in swapped]
    try:
        for config in swapped:
            setattr(config, _EXPERTS, "eager")
        yield
    finally:
        for config, implementation in before:
            setattr(config, _EXPERTS, implementation)


@contextmanager
def _attention(
    model: nn.Module, swapped: Callable[[str | None], bool], fused: Callable[[nn.Module], bool]
) -> Iterator[bool]:
    holders: list[Any] = [
        module
        for module in modules_of(model)
        if hasattr(type(module), "set_attn_implementation")
        and swapped(getattr(getattr(module, "config", None), "_attn_implementation", None))
    ]
    before = [(module, module.config._attn_implementation) for module in holders]
    try:
        for module, _ in before:
            module.set_attn_implementation("sdpa" if fused(module) else "eager")
        yield bool(holders)
    finally:
        for module, implementation in before:
            module.set_attn_implementation(implementation)
