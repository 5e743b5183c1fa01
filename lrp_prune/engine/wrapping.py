"""Modules that are ruled as a whole: activations of several operations, and those that users have registered."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lrp_prune.engine.mode import PropagationMode
from lrp_prune.engine.registry import ModuleRule


@contextmanager
def whole(module: nn.Module, mode: PropagationMode) -> Iterator[None]:
    """Treat an activation module of several operations as one.

    It gets the rule for activations as a whole, or its plain gradient; either way its output's channels are those of its
    input.
    """
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if (
            not mode.is_acting
            or len(args) != 1
            or kwargs
            or not isinstance(args[0], Tensor)
            or not args[0].requires_grad
        ):
            return original(*args, **kwargs)
        result = mode.whole(original, args[0])
        mode.rule_applied(original, args[0], result)
        return result

    with _calling(module, forward):
        yield


@contextmanager
def replaced(module: nn.Module, mode: PropagationMode, rule: ModuleRule) -> Iterator[None]:
    """Let a module's own rule compute what it returns, out of the mode's sight."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not mode.is_acting:
            return original(*args, **kwargs)
        with mode.acting(False):
            result = rule(original, args, kwargs)
        mode.module_ruled(module, result)
        return result

    with _calling(module, forward):
        yield


@contextmanager
def _calling(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for this one instance, by an attribute of it."""
    original, own = module.forward, "forward" in module.__dict__
    module.forward = forward
    try:
        yield
    finally:
        if own:
            module.forward = original
        else:
            del module.forward
