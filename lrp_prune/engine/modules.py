"""Activation modules of several operations, which get the identity rule as a whole."""

import inspect
import re

from torch import nn

from lrp_prune.engine.registry import ACTIVATION_MODULES

_NAME = re.compile(r"(gelu|silu|relu|swish|mish|softplus|activation|laplace)(tanh|python|new|fast)?$", re.IGNORECASE)


def is_activation_module(module: nn.Module) -> bool:
    """Whether the module is an elementwise activation function: registered, one of ``transformers.activations``, or like one.

    The products inside such a module (``x * sigmoid(1.702 * x)``, tanh approximations of GELU, ...) are no products of two
    activations, and would be halved. torch's own activations are one function each, and need no recognition.
    """
    if type(module) in ACTIVATION_MODULES:
        return True
    if next(module.children(), None) is not None or type(module).__module__.startswith("torch."):
        return False
    if type(module).__module__ != "transformers.activations" and not _NAME.search(type(module).__name__):
        return False
    required = [
        parameter
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return len(required) == 1 and all(parameter.dim() <= 1 for parameter in module.parameters())
