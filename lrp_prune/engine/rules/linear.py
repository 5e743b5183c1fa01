"""Products of an activation with a weight, by a rule that declares its :mod:`terms <lrp_prune.engine.rules.terms>`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lrp_prune.engine import functional
from lrp_prune.engine.beside import note_beside
from lrp_prune.engine.call import Call, detached, is_activation
from lrp_prune.engine.forms import Form, form_of
from lrp_prune.engine.precision import without_autocast
from lrp_prune.engine.rule import Rule
from lrp_prune.engine.rules import folding
from lrp_prune.engine.rules.folded import followed, has_channels, preceded, restated
from lrp_prune.engine.rules.layers import Layer, widened
from lrp_prune.engine.rules.messages import Message, arrival
from lrp_prune.engine.rules.terms import Group


@dataclass(frozen=True)
class Terms(Rule):
    """A rule for linear layers and convolutions that is declared by its :attr:`groups`; to be subclassed.

    Example:
        What a positive weight contributes counts twice:

        >>> import torch, lrp_prune
        >>> from lrp_prune.attribution import Group, Term
        >>> class Favoured(Terms):
        ...     @property
        ...     def groups(self):
        ...         return (Group((Term(), Term(weight="positive"))),)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.ReLU(), torch.nn.Linear(8, 2, bias=False))
        >>> composite = lrp_prune.Composite("favoured", {"linear": Favoured()}, base="epsilon")
        >>> with lrp_prune.attributing(model, composite) as propagation:
        ...     value = model(torch.ones(1, 4)).max()
        ...     relevance = propagation.relevance(value)["input"]
        >>> torch.testing.assert_close(relevance.sum(), value.detach())
    """

    kinds: ClassVar[tuple[str, ...] | None] = ("linear", "convolution")

    @property
    def groups(self) -> tuple[Group, ...]:
        """What relevance is shared by."""
        raise NotImplementedError(f"{type(self).__name__} declares no groups of terms")

    def __call__(self, call: Call) -> Any:
        active = [index for index, value in enumerate(call.operands()) if is_activation(value)]
        summands = [value for value in (*call.args, *call.kwargs.values()) if is_activation(value)]
        if not active:
            return call.run()
        if len(active) > 1:
            raise ValueError(
                f"{self} is for a product with a weight, and {call.function.__name__} in {call.name or '<model>'} is one of two "
                "activations: give it a rule for 'matmul'"
            )
        if len(summands) > 1:
            return _beside_a_summand(call, self)
        operands = call.operands()
        if len(operands) != 2:
            raise ValueError(
                f"{self} is for a product of two, and {call.function.__name__} in {call.name or '<model>'} contracts "
                f"{len(operands)} tensors at once: write it as products of two, or give this module another rule"
            )
        place, other = active[0], 1 - active[0]
        without = call.with_operands([None if index == place else value for index, value in enumerate(operands)])
        return ruled(operands[place], operands[other], form_of(without, place, other), self)


class Watching(Protocol):
    """Is shown what comes back to a use of a weight."""

    def __call__(
        self,
        found: list[Message],
        activation: Tensor,
        weight: Tensor,
        d: Tensor,
        input_gradient: Tensor,
        scale: Tensor | None,
    ) -> None: ...


class _Result:
    """What a product was, for as long as nobody changes it in place: most rules share by it, and need not multiply again."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, int] | None = None

    def note(self, result: Tensor) -> None:
        """Keep it, in the same memory; unless what is kept for backward is in somebody's care, who would save that memory."""
        if not folding.saves_elsewhere():
            self._known = result.detach(), result._version

    def taken(self, dtype: torch.dtype) -> Tensor | None:
        """The result, once, if it is as it was and in the precision of the rule."""
        known, self._known = self._known, None
        if known is None or known[0]._version != known[1] or known[0].dtype != dtype:
            return None
        return known[0]


class _Ruled(Function):
    @staticmethod
    def forward(
        ctx: Any,
        activation: Tensor,
        source: Tensor | None,
        weight: Tensor,
        form: Form,
        rule: Terms,
        watching: Watching | None,
        before: folding.Before | None,
        after: folding.Handover,
        result: _Result,
    ) -> Tensor:
        ctx.save_for_backward(activation, weight, *(() if source is None else (source,)))
        ctx.form, ctx.rule, ctx.watching, ctx.after, ctx.result = form, rule, watching, after, result
        ctx.before = None if before is None else (before.scale, before.shift, before.parts)
        return functional.own_memory(form.forward(activation, weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        activation, weight, *others = ctx.saved_tensors
        source = others[0] if others else activation
        with torch._C.DisableTorchFunction(), without_autocast(d.device):
            a, w = widened(source, weight, d)[:2]
            layer, inward = Layer(ctx.form, w, ctx.form.bias(a, w), ctx.result.taken(w.dtype)), None
            if ctx.before is not None:
                inward, shift, parts = ctx.before
                layer = preceded(layer, inward, shift, a)
            arrived, rest = ctx.after.heard(d)
            layers = [(followed(layer, entry), entry.d.to(a.dtype), entry.scale) for entry in arrived]
            if rest is not None:
                layers.append((layer, rest.to(a.dtype), None))
            gradients = []
            for own, of_output, outward in layers:
                back = arrival(ctx.rule.groups, own, a, of_output)
                gradient, left = back.input_gradient(activation.dtype)
                if ctx.watching is not None:
                    found = back.messages()
                    if outward is not None or inward is not None:
                        found = restated(found, outward, inward, of_output.dim())
                    ctx.watching(found, a, w, of_output, gradient.to(a.dtype), inward)
                if left is not None:
                    note_beside(source, left)
                gradients.append(gradient)
            gradient = sum(gradients[1:], gradients[0])
            if ctx.before is not None:
                gradient = folding.handed_back(gradient, source, activation, parts)
        return gradient, None, None, None, None, None, None, None, None


def ruled(activation: Tensor, weight: Tensor, form: Form, rule: Terms, watching: Watching | None = None) -> Tensor:
    """The product of an activation and a weight, propagated by terms.

    Args:
        activation: the input.
        weight: the weight, or whatever is constant.
        form: how they meet; it must not hold the activation.
        rule: declares the terms.
        watching: is shown what comes back.

    Raises:
        ValueError: if the rule declares nothing.
    """
    if not rule.groups:
        raise ValueError(f"{rule} declares no group of terms, so that no relevance would go on: give it one at least")
    before = folding.before(activation) if has_channels(form, activation, weight) else None
    after, known = folding.Handover(), _Result()
    source = None if before is None else before.source
    result = _ruled(activation, source, weight, form, rule, watching, before, after, known)
    known.note(result)
    if has_channels(form, result, weight):
        folding.note_parts(result, [folding.Part(result.shape[1], after, from_layer=True)])
    return result


_ruled: Callable[..., Tensor] = _Ruled.apply


def _beside_a_summand(call: Call, rule: Terms) -> Any:
    """A product to which an activation is added, as by ``addmm``: two operations, with the values of the one."""
    operands = call.operands()
    others = {place: call.argument(*place) for place in (call.operation.added,) if place is not None}
    product = rule(call.with_arguments({place: torch.zeros_like(value) for place, value in others.items()}))
    constant = call.with_operands(list(map(detached, operands)))
    shifted = constant.run()  # through which the summand is propagated
    without_history = constant.with_arguments({place: detached(value) for place, value in others.items()})
    return functional.replaced(product + (shifted - product.detach()), without_history.run)
