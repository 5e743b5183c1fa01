"""The torch-function mode: while it is active, each torch call is looked up and its rule applied.

Nothing about the model is touched. What the mode has to know that a single call does not tell is kept on intermediate
tensors (:mod:`origins <lrp_prune.engine.origins>`, :mod:`tags <lrp_prune.engine.tags>`) and goes with them.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodWrapperType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lrp_prune.engine import tags
from lrp_prune.engine.application import Application
from lrp_prune.engine.audit import Audit
from lrp_prune.engine.composites import Composite
from lrp_prune.engine.endings import Endings, cause_of, ends_in_numbers
from lrp_prune.engine.looking import Unchecked
from lrp_prune.engine.marking import mark_made, mark_taken, without_parameters
from lrp_prune.engine.nested import tensors_in
from lrp_prune.engine.nodes import NO_GRADIENT_NODES, node_kind
from lrp_prune.engine.operations import OPERATIONS, Operation
from lrp_prune.engine.origins import (
    Origin,
    derive,
    mark,
    marked,
    note_source,
    origin_of_parameter,
    source_of,
)
from lrp_prune.engine.places import Places
from lrp_prune.engine.recurrent import recurrent
from lrp_prune.engine.registry import REGISTERED
from lrp_prune.engine.resolving import written_by
from lrp_prune.engine.roots import Roots
from lrp_prune.engine.rules import Call, is_activation
from lrp_prune.engine.rules.folding import carry_parts
from lrp_prune.engine.shadow import Call as Finished
from lrp_prune.engine.tracing import UnitTracer
from lrp_prune.engine.uses import WeightUses

_FIRST = Operation("plain")
_OPERATORS = (torch._ops.OpOverloadPacket, torch._ops.OpOverload)
_ACTIVATION = Operation("activation")


class PropagationMode(TorchFunctionMode):
    """Applies a composite to every torch call while :meth:`acting`.

    Args:
        composite: the rules.
        parameters: canonical name -> parameter of the model.
        places: knows the module that runs.
        roots: where relevance ends; embedding outputs, and parameters and constants that enter as data, are added to it.
        uses: what is to be observed where weights are used.
        endings: remembers where relevance was stopped.
        tracing: whether activations are tagged (only rules and units that need it).
        tracer: follows units, or None.
        audit: finds operations without a rule, or None.
        kept: the precision in which rules may keep activations for the backward pass; None for their own.
    """

    def __init__(
        self,
        composite: Composite,
        parameters: Mapping[str, nn.Parameter],
        places: Places,
        roots: Roots,
        uses: WeightUses,
        endings: Endings,
        tracing: bool,
        tracer: UnitTracer | None,
        audit: Audit | None,
        kept: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._scales = composite.needs("statistics")
        self._origins = {id(parameter): origin_of_parameter(name, parameter) for name, parameter in parameters.items()}
        self._parameters = parameters
        self._places = places
        self._roots, self._absorbing = roots, roots.absorbing
        self._uses, self._endings = uses, endings
        self._tracing, self._tracer = tracing, tracer
        self.audit = audit
        self.kept = kept
        self._acting = 0
        self._inside: list[Any] = []
        self._unchecked = Unchecked()
        own = partial(_is_own, self._origins, places)
        # Without a circle, so that all of it is gone as soon as nothing uses it.
        self._application = Application(composite, roots, uses, tracer, own, weakref.ref(self))

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
        with torch._C.DisableTorchFunction():
            self._finish(function, "activation", Call(function, _FIRST, (operand,), {}), result)

    def module_ruled(self, module: nn.Module, result: Any) -> None:
        """Account for a module that has a rule of its own."""
        if self.audit is not None:
            with torch._C.DisableTorchFunction():
                self.audit.made(module, result, ruled=True)

    def carry(self, source: Any, copy: Any) -> None:
        """A copy that was made out of sight is what it is a copy of."""
        tags.set_tag(copy, tags.tag_of(source))
        carry_parts(source, copy)
        if self._tracer is not None:
            self._tracer.carry(source, copy)

    def backward(self, target: Tensor, tensors: Sequence[Tensor], again: bool = False) -> tuple[Tensor | None, ...]:
        """``torch.autograd.grad`` with the mode on: left to itself, it would hand itself to the mode and run with it off.

        To be called where the mode is entered. Entered once more, it would be on within its own rules in recomputed layers.

        Args:
            target: a scalar.
            tensors: what its gradients are wanted of.
            again: whether the graph is gone through again.
        """
        grad = self._unchecked.of(torch.autograd.grad)
        return tuple(grad(target, list(tensors), allow_unused=True, retain_graph=again))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self._uses.saving as saving:
            if self._acting:
                saving.called(func, kwargs)
            return self._handled(func, args, kwargs)

    def _handled(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # By far the most frequent of all: a third of the calls of a transformer.
        if not self._acting or func is torch._C._set_grad_enabled:
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return self._without_gradients(func, args, kwargs)
        if type(func) is MethodWrapperType:
            return self._attribute(func, args, kwargs)
        if self.audit is not None:
            self.audit.arrive((args, kwargs))
        registered = REGISTERED.get(func)
        operation = OPERATIONS.get(func)
        if registered is not None:
            operation = (operation or Operation(""))._replace(kind="registered", functional=None)
        if operation is None:
            if isinstance(func, FunctionType) and func not in self._inside:
                return self._look_inside(func, args, kwargs)
            return self._plain(func, args, kwargs)
        given = args, kwargs
        args, kwargs, constant = without_parameters(args, kwargs, self._origins, self._uses.touched)
        call = before = self._called(func, operation, args, kwargs)
        if registered is not None:
            result = registered(call)
        elif operation.runs_in_steps:
            result = recurrent(call, Call(func, operation, *given), self._application.ruled, self._uses)
        elif operation.functional is not None or written_by(func):
            result, before = self._in_place(call)
        else:
            result = self._application.apply(call)
        if constant is not None and func.__name__ == "__setitem__":
            mark_made(func, "plain", (args[0], args[2]), {}, args[0])
        elif constant is not None and isinstance(result, Tensor) and not result.requires_grad:
            mark_made(func, operation.kind, args, kwargs, result)
        self._finish(func, operation.kind, call, result, before)
        return result

    def _called(
        self, func: Callable[..., Any], operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Call:
        name, module = self._places.innermost
        absorbing = self._absorbing and partial(self._absorbing, module=name)
        return Call(
            func, operation, args, kwargs, self.kept, name, module, absorbing=absorbing, held=self._uses.note_held
        )

    def whole(self, function: Callable[[Tensor], Any], x: Tensor) -> Any:
        """The result of an activation module of several operations, by the rule for activations.

        Args:
            function: the module's forward.
            x: its argument.
        """
        call = self._called(function, _ACTIVATION, (x,), {})
        if self._application.leaves(call):
            return function(x)  # its operations are seen one by one
        with self.acting(False):
            return self._application.ruled(call).ruled()

    def _look_inside(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        copy = self._unchecked.of(func)
        self._inside.append(func)
        try:
            with self:
                return copy(*args, **kwargs)
        finally:
            self._inside.pop()

    def _in_place(self, call: Call) -> tuple[Any, Call]:
        """An in-place operation: of what is only added or assigned as it is, of others the twin on a copy, written back.

        So nothing that backward needs is overwritten.

        Returns:
            The result, and the call with its arguments as they were before.
        """
        target, functional = call.argument(0, "input"), call.operation.functional
        if call.operation.drops:
            return target, call
        if call.operation.enters and not self._application.shares(call) and not self._roots.absorbs(call):
            call, before = self._roots.with_data(call, written=True), call
            if self._tracer is not None and call.operation.adds and is_activation(target):
                copy = target.clone()  # what it was made of is seen from its node, and it is about to get another
                self.carry(target, copy)
                before = call.replacing(target, copy)
            result = call.run()
            if not is_activation(target):
                self._roots.written(target, call.operand(1))
            return result, before
        assert functional is not None
        if not call.has_activations:
            return call.run(), call
        twin = OPERATIONS[functional]
        before = target.clone()
        self.carry(target, before)
        as_before = call.replacing(target, before)
        result = self._application.apply(as_before._replace(function=functional, operation=twin))
        written = target.copy_(result)
        tags.set_tag(written, tags.tag_of(result))
        return written, as_before

    def _plain(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args and not kwargs:
            return func(*args, **kwargs)
        args, kwargs, constant = without_parameters(args, kwargs, self._origins, self._uses.touched)
        if constant is None:
            result = func(*args, **kwargs)
        else:
            result = self._application.taken(self._called(func, _FIRST, args, kwargs))
            mark_taken(func, args, kwargs, constant, result)
        self._finish(func, "plain", Call(func, _FIRST, args, kwargs), result)
        return result

    def _attribute(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An attribute of a tensor that is read or set; most are no tensors themselves."""
        result = func(*args, **kwargs)
        if func.__name__ != "__get__" or not isinstance(result, Tensor) or not isinstance(args[0], Tensor):
            return result
        source = args[0]
        if self.audit is not None:
            self.audit.arrive(source)
        if is_activation(source) and not result.requires_grad and result.is_floating_point():
            self._ended(func, args, result, "detached")
        tag = tags.tag_of(source)
        if tag is not None:
            tags.set_tag(result, tag)
        if is_activation(source):
            if self._tracer is not None:
                self._tracer.after(Finished("__get__", "plain", func, args, kwargs, result))
            return result
        origin = self._origins.get(id(source)) or source_of(source)
        if isinstance(source, nn.Parameter):  # also one that the model does not know as its own
            result = result.detach()
        if origin is not None and isinstance(source, nn.Parameter):
            self._uses.touched.add(origin.name)
        if origin is not None and (isinstance(source, nn.Parameter) or marked(source) is not None):
            mark(result, derive(origin, source, result, False, "__get__", lambda stand_in: func(stand_in)))
        elif origin is not None:
            note_source(result, origin)
        return result

    def _finish(self, func: Any, kind: str, call: Call, result: Any, before: Call | None = None) -> None:
        """Account for a function that has run.

        Args:
            func: the function.
            kind: its kind of operation.
            call: its call.
            result: what it returned.
            before: the call with its arguments as they were before, where it has changed one.
        """
        if kind != "registered" and (self._tracing or self._scales):
            self._tag(func, kind, call.operands(), result)
        if self._tracer is not None and kind != "composed":  # whose parts have been followed one by one
            args = (before or call).args
            self._tracer.after(Finished(tags.stem(func), kind, func, args, call.kwargs, result))
        if self.audit is not None:
            self.audit.made(func, result, ruled=kind != "plain" or func in OPERATIONS)
        first = result[0] if isinstance(result, tuple | list) and result else result
        if (isinstance(first, Tensor) and not first.requires_grad) or ends_in_numbers(func):
            self._ended(func, (call.args, call.kwargs), result, cause_of(func, kind, first))
        elif isinstance(func, _OPERATORS) and isinstance(first, Tensor):
            self._ends_here(func, first)

    def _tag(self, func: Any, kind: str, operands: list[Any], result: Any) -> None:
        if not self._tracing and not any(map(tags.tag_of, operands)):
            return
        # What a rule has stopped is no activation any more, but is still a pattern or a gate.
        active = [is_activation(operand) or tags.tag_of(operand) is not None for operand in operands]
        if any(active):
            found = tags.after(tags.stem(func), kind, operands, active)
            if kind != "plain" and any(result is operand for operand in operands):
                tags.clear_tag(result)  # changed in place, it is not what it was
            tags.set_tag(result, found)

    def _ends_here(self, func: Any, result: Tensor) -> None:
        """Note an operator whose result has an autograd node, but one that passes nothing on."""
        if result.grad_fn is not None and node_kind(result.grad_fn) in NO_GRADIENT_NODES:
            self._endings.has_no_gradient(func, self._places)

    def _without_gradients(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        self._roots.ids.after(tensors_in((args, kwargs)), result)
        if isinstance(result, Tensor) and result.is_floating_point():
            self._ended(func, (args, kwargs), result, "no_grad")
            without_parameters(args, kwargs, self._origins, self._uses.without_gradients)  # tells which there are
        return result

    def _ended(self, func: Any, values: Any, result: Any, cause: str) -> None:
        self._endings.ended(func, tensors_in(values), result, cause, self._places)
        self._roots.ids.after(tensors_in(values), result)


def _is_own(origins: Mapping[int, Origin], places: Places, origin: Origin | None) -> bool:
    """Whether a parameter is one of the module that runs."""
    if origin is None:
        return False
    own = (origins.get(id(parameter)) for parameter in places.module._parameters.values())
    return any(found is not None and found.name == origin.name for found in own)
