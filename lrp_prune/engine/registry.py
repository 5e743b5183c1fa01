"""Rules that users add, by torch function or by class of module."""

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from lrp_prune.engine.operations import KINDS, OPERATIONS, ROWS, Operation, Place
from lrp_prune.engine.rule_text import CLASSES, known_names
from lrp_prune.engine.rules import RULES, Call, Identity, Own, Rule

ModuleRule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Computes what a module returns, from its forward and its arguments."""

REGISTERED: dict[Callable[..., Any], Rule] = {}
ACTIVATION_MODULES: set[type[nn.Module]] = set()
MODULE_RULES: dict[type[nn.Module], ModuleRule] = {}

_TWO: tuple[Place, ...] = ((0, "input"), (1, "other"))
_OPERANDS: dict[str, tuple[Place, ...]] = {
    **dict.fromkeys(("product", "linear", "convolution", "matmul", "division"), _TWO),
    "attention": ((0, "query"), (1, "key"), (2, "value")),
}
"""Where operands are expected of kinds that have several."""


class RegisteredRule:
    """A rule that can be taken back: by :meth:`remove`, or at the end of a ``with`` block."""

    def __init__(self, table: Any, key: Any) -> None:
        self._table, self._key = table, key
        self._before = table.get(key) if isinstance(table, dict) else key in table
        self._active = True

    def remove(self) -> None:
        """Let the operation have the rule that it had before, if any; a second time does nothing."""
        if not self._active:
            return
        self._active = False
        if isinstance(self._table, dict) and self._before is not None:
            self._table[self._key] = self._before
        elif isinstance(self._table, dict):
            self._table.pop(self._key, None)
        elif not self._before:
            self._table.discard(self._key)

    def __enter__(self) -> "RegisteredRule":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def register_rule(
    function: str | Callable[..., Any] | type[nn.Module], rule: str | Callable[..., Any]
) -> RegisteredRule:
    r"""Say how an operation hands on relevance, or name a rule for composites; for good or for the time of a ``with`` block.

    Args:
        function: a torch function (as a torch-function mode sees it), or the class of a module. Or a name: composites then know
            the rule by it, also in YAML. A class of rules has settings there, ``"by_power(3)"``.
        rule: one of

            * a kind of operation (``"activation"``, ``"statistic"``, ...): the composite's rule for that kind applies. Kinds
              with several operands take the first ones;
            * the name of a rule (``"identity"``, ``"stop"``, ``"gradient"``, ...): it always applies;
            * a :class:`~lrp_prune.attribution.Rule`, or a callable ``rule(function, args, kwargs)`` that returns the
              operation's result, built so that its gradient times input is the relevance. Parameters among the arguments are
              detached. Weights that such an operation multiplies are not scored by :func:`lrp_prune.attribute`: a rule in a
              composite is the way to that.

            For a module class the rule is about the module as a whole, whatever it runs: ``"activation"`` (an elementwise
            function, which gets the composite's rule for those), ``"gradient"`` (its own gradient, as of a
            ``torch.autograd.Function`` that is linear), or a callable, which is given the module's forward.

    Returns:
        A handle that takes the rule back, by ``remove()`` or as a context manager; what was registered before is then as it was.

    Raises:
        ValueError: for an unknown name, or a function that no mode can see.

    Example:
        The generalised gamma rule (Montavon et al. 2019; Andeol et al. 2021) for convolutions favours contributions
        :math:`x_i w_{ij}` of the sign of the output :math:`z_j` by :math:`\gamma`. With :math:`(\cdot)^\pm` for positive and
        negative parts, and the upper signs where :math:`z_j > 0`,

        .. math:: p_j = \sum_i x_i^+ (w_{ij} + \gamma w_{ij}^\pm) + x_i^- (w_{ij} + \gamma w_{ij}^\mp)

        takes the place of :math:`z_j`, times :math:`z_j / p_j` as a constant:

        >>> import torch, lrp_prune
        >>> from torch import nn
        >>> def gamma_rule(function, args, kwargs, gamma=0.25):
        ...     x, weight, bias, *rest = args
        ...     more, less = weight + gamma * weight.clamp(min=0), weight + gamma * weight.clamp(max=0)
        ...     plus, minus = x.clamp(min=0), x.clamp(max=0)
        ...     z = function(*args, **kwargs)
        ...     positive = function(plus, more, None, *rest) + function(minus, less, None, *rest)
        ...     negative = function(plus, less, None, *rest) + function(minus, more, None, *rest)
        ...     p = torch.where(z > 0, positive, negative)
        ...     propagated = p * (z / p).detach().nan_to_num(0, 0, 0)
        ...     return z.detach() + propagated - propagated.detach()
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2, bias=False))
        >>> image = torch.randn(1, 3, 3, 3)
        >>> with lrp_prune.register_rule(torch.conv2d, gamma_rule), lrp_prune.attributing(model) as propagation:
        ...     value = model(image)[0, 0]
        ...     relevance = propagation.relevance(value)
        >>> bool(torch.isclose(relevance["input"].sum(), value, atol=1e-5))
        True
    """
    if isinstance(function, str):
        return _register_name(function, rule)
    if isinstance(function, type):
        return _register_module(function, rule)
    _check_visible(function)
    return _register_function(function, rule)


def _register_name(name: str, rule: Any) -> RegisteredRule:
    if not name.isidentifier() or name in known_names():
        raise ValueError(f"a rule's name must be one word, and none of {known_names()}, got {name!r}")
    if isinstance(rule, type) and issubclass(rule, Rule):
        handle = RegisteredRule(CLASSES, name)
        CLASSES[name] = rule
        return handle
    if isinstance(rule, type) or not callable(rule):
        raise ValueError(
            f"what is named {name!r} must be a Rule, a class of rules, or a function of a call, got {rule!r}"
        )
    handle = RegisteredRule(RULES, name)
    RULES[name] = rule if isinstance(rule, Rule) else Own(rule)
    return handle


def _register_function(function: Callable[..., Any], rule: str | Callable[..., Any]) -> RegisteredRule:
    _check_kind(function, RULES.get(rule) if isinstance(rule, str) else rule)
    if not isinstance(rule, str):
        handle = RegisteredRule(REGISTERED, function)
        REGISTERED[function] = rule if isinstance(rule, Rule) else _Adapted(rule)
    elif rule in KINDS:
        row = ROWS.get(function.__name__, Operation("plain"))
        if rule == "normalization" and row.signature is None:
            raise ValueError(
                f"what {function.__name__} normalises over cannot be told from its arguments: give a rule as a function"
            )
        handle = RegisteredRule(OPERATIONS, function)
        added = (2, "bias") if rule in ("linear", "convolution") and row.added is None else row.added
        operands = _OPERANDS.get(rule, ((0, "input"),))
        OPERATIONS[function] = Operation(rule, operands, signature=row.signature, added=added)
    elif rule in RULES:
        handle = RegisteredRule(REGISTERED, function)
        REGISTERED[function] = RULES[rule]
    else:
        raise ValueError(f"rule must be a callable, a kind {KINDS} or a rule {tuple(RULES)}, got {rule!r}")
    return handle


def _check_kind(function: Callable[..., Any], rule: Any) -> None:
    """Refuse a rule that is for other kinds of operation than a function's."""
    if not isinstance(rule, Rule) or rule.kinds is None or rule.kinds == Identity.kinds:
        return  # that of an activation goes for whatever has one operand
    kind = OPERATIONS[function].kind if function in OPERATIONS else ""
    products = ("linear", "convolution", "matmul", "einsum")
    if kind not in rule.kinds and not (set(rule.kinds) & set(products) and kind in products):
        raise ValueError(
            f"{rule} is a rule for {rule.kinds}, and {function.__name__} is {kind or 'of no kind that is known'}: register the "
            f"function as {rule.kinds[0]!r}, and give the rule to a composite"
        )


class _Adapted(Own):
    """A function of function, arguments and keyword arguments, which sees nothing else of a call."""

    def __call__(self, call: Call) -> Any:
        return self.function(call.function, call.args, call.kwargs)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()


def any_placed() -> bool:
    """Whether a registered rule needs to know the module that runs."""
    return any("places" in rule.needs for rule in REGISTERED.values())


def _register_module(kind: type, rule: str | Callable[..., Any]) -> RegisteredRule:
    if issubclass(kind, nn.Module) and rule in ("activation", "identity"):
        handle = RegisteredRule(ACTIVATION_MODULES, kind)
        ACTIVATION_MODULES.add(kind)
        return handle
    if issubclass(kind, nn.Module) and (rule == "gradient" or not isinstance(rule, str)):
        handle = RegisteredRule(MODULE_RULES, kind)
        MODULE_RULES[kind] = _own_gradient if isinstance(rule, str) else rule
        return handle
    raise ValueError(
        f"a module class is registered as 'activation', 'gradient' or with a function, got {rule!r} for {kind.__name__}"
    )


def _own_gradient(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)


def _check_visible(function: Callable[..., Any]) -> None:
    """Refuse what a mode never sees, so that its rule would never be asked."""
    name = getattr(function, "__qualname__", None) or repr(function)
    hidden = isinstance(function, torch.jit.ScriptFunction) or isinstance(getattr(function, "__self__", None), type)
    if isinstance(function, MethodType) or hidden:
        raise ValueError(
            f"{name} is hidden from the rules (scripted, or of a torch.autograd.Function): register the class of the module that "
            "runs it"
        )
    if isinstance(function, FunctionType) and function not in OPERATIONS:
        asks = {name for name in function.__code__.co_names if name.startswith("has_torch_function")}
        if not asks:
            raise ValueError(
                f"{name} is a Python function, which the rules look into: register the torch functions that it calls, the class "
                "of the module that runs it, or wrap it by torch.overrides.wrap_torch_function"
            )
