"""The torch-function mode: while it is active, each torch call is looked up and its rule applied.

Nothing about the model is touched. What the mode has to know that a single call does not tell is kept on intermediate
tensors (:mod:`origins <lrp_prune.attribution.origins>`, :mod:`tags <lrp_prune.attribution.tags>`) and goes with them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lrp_prune.attribution import tags
from lrp_prune.attribution.audit import Audit
from lrp_prune.attribution.composites import Composite
from lrp_prune.attribution.operations import OPERATIONS, Operation
from lrp_prune.attribution.origins import Origin, derive, mark, marked, of_operation, origin_of_parameter
from lrp_prune.attribution.recurrent import recurrent
from lrp_prune.attribution.registry import REGISTERED
from lrp_prune.attribution.roots import Roots
from lrp_prune.attribution.rules import Call, Rule, identity, identity_of_power, is_activation
from lrp_prune.attribution.shadows import Call as Finished
from lrp_prune.attribution.tracing import UnitTracer
from lrp_prune.attribution.uses import WeightUses

_PLAIN = Operation("plain", ())
_ROOT_KINDS = frozenset({"embedding", "sum"})


def _unchecked(function: FunctionType, cache: dict[int, dict[str, Any]]) -> FunctionType:
    """The same Python function, blind to overrides: its body runs, and what it calls is seen by the mode.

    torch's Python functions first ask ``has_torch_function`` and then hand themselves to the mode, which would go on for ever.
    """
    namespace = cache.get(id(function.__globals__))
    if namespace is None:
        namespace = dict(function.__globals__)
        for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
            if name in namespace:
                namespace[name] = lambda *_: False
        cache[id(function.__globals__)] = namespace
    copy = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class PropagationMode(TorchFunctionMode):
    """Applies a composite to every torch call while :meth:`acting`.

    Args:
        composite: the rules.
        parameters: canonical name -> parameter of the model.
        roots: where relevance ends; embedding outputs and parameters that enter as data are added to it.
        uses: what is to be observed where weights are used.
        tracing: whether activations are tagged (only rules and units that need it).
        tracer: follows units, or None.
        audit: finds operations without a rule, or None.
        kept: the precision in which rules may keep activations for the backward pass; None for their own.
    """

    def __init__(
        self,
        composite: Composite,
        parameters: Mapping[str, nn.Parameter],
        roots: Roots,
        uses: WeightUses,
        tracing: bool,
        tracer: UnitTracer | None,
        audit: Audit | None,
        kept: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._composite = composite
        self._origins = {id(parameter): origin_of_parameter(name, parameter) for name, parameter in parameters.items()}
        self._parameters = parameters
        self._roots = roots
        self._uses = uses
        self._tracing, self._tracer = tracing, tracer
        self.audit = audit
        self.kept = kept
        self._acting = 0
        self._rules: dict[str, Rule] = {}
        self._inside: list[Any] = []
        self._copies: dict[Any, FunctionType] = {}
        self._namespaces: dict[int, dict[str, Any]] = {}

    @contextmanager
    def acting(self, on: bool = True) -> Iterator[None]:
        """Rules act inside this context, and nowhere else; ``on=False`` suspends them."""
        before, self._acting = self._acting, self._acting + 1 if on else 0
        try:
            yield
        finally:
            self._acting = before

    @property
    def is_acting(self) -> bool:
        """Whether rules act now."""
        return self._acting > 0

    def rule_applied(self, function: Callable[..., Any], operand: Tensor, result: Tensor) -> None:
        """Account for an activation module that was ruled as a whole; ``function`` is its forward."""
        self._finish(function, "activation", [operand], (operand,), {}, result, ruled=True)

    def carry(self, source: Any, copy: Any) -> None:
        """A copy that was made out of sight is what it is a copy of."""
        tags.set_tag(copy, tags.tag_of(source))
        if self._tracer is not None:
            self._tracer.carry(source, copy)

    def backward(self, target: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """``torch.autograd.grad`` with the mode on: left to itself, it would hand itself to the mode and run with it off.

        To be called where the mode is entered. Entered once more, it would be on within its own rules in recomputed layers.
        """
        return tuple(self._unchecked(torch.autograd.grad)(target, list(tensors), allow_unused=True))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._acting or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        registered = REGISTERED.get(func)
        operation = OPERATIONS.get(func) if registered is None else Operation("registered")
        if operation is None:
            if isinstance(func, FunctionType) and func not in self._inside:
                return self._look_inside(func, args, kwargs)
            return self._plain(func, args, kwargs)
        given = Call(func, operation, args, kwargs)
        args, kwargs, constant = self._without_parameters(args, kwargs)
        call = Call(func, operation, args, kwargs, self.kept)
        if registered is not None:
            result = registered(call)
        elif operation.kind == "recurrent":
            result = recurrent(call, given, self._rule, self._uses)
        elif operation.functional is not None:
            result, args = self._in_place(call)
        else:
            result = self._apply(call)
        if constant is not None and isinstance(result, Tensor) and not result.requires_grad:
            self._mark_made(func, operation.kind, args, kwargs, result)
        operands = call.operands() if registered is None else []
        self._finish(func, operation.kind, operands, args, kwargs, result, ruled=True)
        return result

    def _look_inside(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        copy = self._unchecked(func)
        self._inside.append(func)
        try:
            with self:
                return copy(*args, **kwargs)
        finally:
            self._inside.pop()

    def _unchecked(self, func: Callable[..., Any]) -> FunctionType:
        copy = self._copies.get(func)
        if copy is None:
            assert isinstance(func, FunctionType)
            copy = self._copies[func] = _unchecked(func, self._namespaces)
        return copy

    def _apply(self, call: Call) -> Any:
        kind = call.operation.kind
        if kind == "embedding":
            return self._roots.embedding(call, marked(call.operand(0)))
        if kind == "sum":
            return self._roots.with_data_roots(call).run()
        if kind == "plain":
            return call.run()
        if kind == "power":
            call, kind = _power(call)
            if kind == "activation" and self._rule(kind) is identity and not isinstance(call.operand(1), Tensor):
                return identity_of_power(call) if is_activation(call.operand(0)) else call.run()
        elif kind == "einsum":
            call, kind = _einsum(call)
        if kind == "matmul":
            result = self._uses.observed(call)
            if result is not None:
                return result
        if not any(map(is_activation, call.operands())) and kind != "dropout":
            return call.run()
        return self._rule(kind)(call)

    def _rule(self, kind: str) -> Rule:
        rule = self._rules.get(kind)
        if rule is None:
            rule = self._rules[kind] = self._composite.rule(kind)
        return rule

    def _in_place(self, call: Call) -> tuple[Any, tuple[Any, ...]]:
        """An in-place operation as its out-of-place twin on a copy, written back: nothing that backward needs is overwritten.

        Returns:
            The result, and the arguments as they were before.
        """
        target, functional = call.operand(0), call.operation.functional
        assert functional is not None
        if call.operation.kind == "dropout":
            return target, call.args
        if not any(map(is_activation, call.operands())):
            return call.run(), call.args
        twin = OPERATIONS[functional]
        before = target.clone()
        self.carry(target, before)
        args = tuple(before if arg is target else arg for arg in call.args)
        result = self._apply(Call(functional, twin, args, call.kwargs, call.kept))
        return target.copy_(result), args

    def _plain(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__set__" or (not args and not kwargs):
            return func(*args, **kwargs)
        if name == "__get__":
            result = func(*args, **kwargs)
            if not isinstance(result, Tensor) or not isinstance(args[0], Tensor):
                return result
            if is_activation(args[0]):
                if self._tracing:
                    tags.set_tag(result, tags.tag_of(args[0]))
                if self._tracer is not None:
                    self._tracer.after(Finished(name, "plain", func, args, kwargs, result))
                return result
            origin, source = self._origin(args[0]), args[0]
            if origin is not None and isinstance(args[0], nn.Parameter):
                self._uses.touched.add(origin.name)
                result = result.detach()
            if origin is not None:
                mark(result, derive(origin, source, result, False, name, lambda stand_in: func(stand_in)))
            return result
        args, kwargs, constant = self._without_parameters(args, kwargs)
        result = func(*args, **kwargs)
        if constant is not None and name == "__setitem__":
            self._mark_made(func, "plain", (args[0], args[2]), {}, args[0])
        elif constant is not None:
            self._mark_taken(func, args, kwargs, constant, result)
        self._finish(func, "plain", [args[0]] if args else [], args, kwargs, result, ruled=False)
        return result

    def _mark_taken(self, func: Any, args: Any, kwargs: Any, constant: Tensor, result: Any) -> None:
        """Mark what a function without a rule made of constants: views and copies of one of them, as a rule."""
        name = getattr(func, "__name__", "")
        several = isinstance(result, tuple | list)
        for index, entry in enumerate(result if several else (result,)):
            if not isinstance(entry, Tensor) or not entry.is_floating_point() or entry.requires_grad:
                continue
            origin = marked(constant)
            viewed = entry.untyped_storage()._cdata == constant.untyped_storage()._cdata
            if origin is None or not (viewed or name in tags.ELEMENTWISE_COPIES) or _writes(name):
                self._mark_made(func, "plain", args, kwargs, entry)
                continue

            def again(stand_in: Tensor, index: int = index) -> Any:
                made = func(*_replaced(args, constant, stand_in), **_replaced(kwargs, constant, stand_in))
                return made[index] if several else made

            mark(entry, derive(origin, constant, entry, name in tags.ELEMENTWISE_COPIES, name, again))

    def _mark_made(self, func: Any, kind: str, args: Any, kwargs: Any, result: Tensor) -> None:
        """Mark what a function computed from constants."""
        name, operands = getattr(func, "__name__", ""), [*args, *kwargs.values()]
        if name.endswith("_like") or name.startswith("new_"):
            return  # it has the shape of a parameter, and nothing else
        if any(result is operand and (kind == "dropout" or marked(operand) is None) for operand in operands):
            return  # nothing was done; or a buffer was written to, which stays what it is
        flat = [entry for value in operands for entry in (value if isinstance(value, tuple | list) else (value,))]

        def again(carrier: Tensor, stand_in: Tensor) -> Any:
            return func(*_replaced(args, carrier, stand_in), **_replaced(kwargs, carrier, stand_in))

        origin = of_operation(name, kind, flat, result, again)
        if origin is not None:
            mark(result, origin)

    def _finish(
        self,
        func: Any,
        kind: str,
        operands: list[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        ruled: bool,
    ) -> None:
        if self._tracing:
            active = [is_activation(operand) for operand in operands]
            if any(active):
                found = tags.after(tags.stem(func), kind, operands, active)
                if kind != "plain" and any(result is operand for operand in operands):
                    tags.clear_tag(result)  # changed in place, it is not what it was
                tags.set_tag(result, found)
        if self._tracer is not None:
            self._tracer.after(Finished(tags.stem(func), kind, func, args, kwargs, result))
        if self.audit is not None:
            self.audit.visit(func, result, ruled)

    def _origin(self, tensor: Tensor) -> Origin | None:
        return self._origins.get(id(tensor)) or marked(tensor)

    def _without_parameters(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any], Tensor | None]:
        """The arguments with parameters detached (and marked), and one that stems from a parameter, if any does."""
        found: Tensor | None = None

        def convert(value: Any) -> Any:
            nonlocal found
            if isinstance(value, Tensor):
                if isinstance(value, nn.Parameter):
                    origin = self._origins.get(id(value))
                    value = value.detach()
                    if origin is not None:
                        mark(value, origin)
                        self._uses.touched.add(origin.name)
                        found = value if found is None else found
                elif found is None and not value.requires_grad and marked(value) is not None:
                    found = value
                return value
            if isinstance(value, list | tuple) and value and not isinstance(value, torch.Size):
                converted = [convert(entry) for entry in value]
                return type(value)(*converted) if hasattr(value, "_fields") else type(value)(converted)
            return value

        converted = tuple(convert(value) for value in args)
        return converted, {name: convert(value) for name, value in kwargs.items()}, found


def _writes(name: str) -> bool:
    """Whether a function changes its argument in place, by its name."""
    return name.endswith("_") and not name.endswith("__")


def _replaced(values: Any, old: Tensor, new: Tensor) -> Any:
    """Arguments with one tensor in another's place."""
    if isinstance(values, dict):
        return {name: _replaced(value, old, new) for name, value in values.items()}
    if isinstance(values, tuple | list) and not isinstance(values, torch.Size):
        return type(values)(_replaced(value, old, new) for value in values)
    return new if values is old else values


def _power(call: Call) -> tuple[Call, str]:
    """``x ** n`` is an elementwise function of x; with n < 0 it is a divisor, hence a statistic."""
    base, exponent = call.operands()
    if isinstance(exponent, Tensor):
        return call.with_operands([base, exponent.detach()]), "activation"
    return call, "statistic" if exponent < 0 or exponent == 0.5 else "activation"


def _einsum(call: Call) -> tuple[Call, str]:
    """A contraction is a product of matrices, with its tensors as operands, given one by one or as a list."""
    tensors = call.args[1:]
    if len(tensors) == 1 and isinstance(tensors[0], tuple | list):
        tensors = tuple(tensors[0])
    operands = tuple((index + 1, f"operand{index}") for index in range(len(tensors)))
    return call._replace(operation=Operation("matmul", operands), args=(call.args[0], *tensors)), "matmul"
