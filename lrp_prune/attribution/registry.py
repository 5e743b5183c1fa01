"""Rules that users add, by torch function or by class of activation module."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lrp_prune.attribution.composites import RULES
from lrp_prune.attribution.operations import KINDS, OPERATIONS, Operation
from lrp_prune.attribution.rules import Call, Rule

REGISTERED: dict[Callable[..., Any], Rule] = {}
ACTIVATION_MODULES: set[type[nn.Module]] = set()


def register_rule(function: Callable[..., Any] | type[nn.Module], rule: str | Callable[..., Any]) -> None:
    """Say how an operation that lrp-prune does not know hands on relevance.

    Args:
        function: a torch function (as a torch-function mode sees it), or the class of an elementwise activation module.
        rule: one of

            * a kind of operation (``"activation"``, ``"statistic"``, ...): the composite's rule for that kind applies;
            * the name of a rule (``"identity"``, ``"stop"``, ``"gradient"``, ...): it always applies;
            * a callable ``rule(function, args, kwargs)`` that returns the operation's result, built so that its gradient
              times input is the relevance. Parameters among the arguments are detached.

            For a module class only ``"activation"``: the module as a whole then gets the activation rule.

    Raises:
        ValueError: for an unknown name, or another rule for a module class.

    Example:
        >>> import torch
        >>> from lrp_prune.attribution import register_rule
        >>> register_rule(torch.special.i0e, "activation")
    """
    if isinstance(function, type):
        if not issubclass(function, nn.Module) or rule not in ("activation", "identity"):
            raise ValueError(f"a module class is registered as 'activation', got {rule!r} for {function.__name__}")
        ACTIVATION_MODULES.add(function)
        return
    if not isinstance(rule, str):
        given = rule

        def adapted(call: Call) -> Any:
            return given(call.function, call.args, call.kwargs)

        REGISTERED[function] = adapted
    elif rule in KINDS:
        OPERATIONS[function] = Operation(rule)
    elif rule in RULES:
        REGISTERED[function] = RULES[rule]
    else:
        raise ValueError(f"rule must be a callable, a kind {KINDS} or a rule {tuple(RULES)}, got {rule!r}")
