"""Attention backends that are no torch function, swapped for the time of a pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_VISIBLE = ("eager", "sdpa", None)


@contextmanager
def traceable_attention(model: nn.Module) -> Iterator[None]:
    """Let Hugging Face models with flash or flex attention use ``sdpa``, or ``eager`` where they have no other."""
    holders: list[Any] = [
        module
        for module in model.modules()
        if hasattr(module, "set_attn_implementation")
        and getattr(getattr(module, "config", None), "_attn_implementation", None) not in _VISIBLE
    ]
    before = [(module, module.config._attn_implementation) for module in holders]
    try:
        for module, _ in before:
            module.set_attn_implementation("sdpa" if getattr(module, "_supports_sdpa", False) else "eager")
        yield
    finally:
        for module, implementation in before:
            module.set_attn_implementation(implementation)
