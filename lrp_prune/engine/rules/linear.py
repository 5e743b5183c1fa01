r"""Rules for products of an activation with a weight, declared by terms from which all relevance follows.

With :math:`z_j = \sum_i x_i w_{ji} + b_j`, a rule gives the input ``i`` of the output ``j``, and so the weight between them,

.. math:: R_{ji} = \sum_g \lambda_g \frac{n^g_{ji}}{\sum_i n^g_{ji} + b^g_j} R_j,
    \qquad n^g_{ji} = \sum_{t \in g} f_t \, x_i^{p_t} \, w_{ji}^{q_t}

where each *term* ``t`` takes a part of the input and a part of the weight (their positive or negative entries, or the whole) by
a factor, and the terms of a *group* ``g`` share :math:`\lambda_g` of the relevance of those outputs that the group is for. A bias
is the weight of an input of one, and keeps what it gets. Where nothing contributes to a group, its share is lost.

At given signs of input, weight and output a message :math:`R_{ji}` is :math:`x_i w_{ji}` times something that the output alone
tells. So the relevance of inputs and of weights, in every statistic, follows from at most four gradients of the output, one for
each sign of the input and of the weight (:class:`Message`). Terms of the whole are the plain gradient, and cost nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lrp_prune.engine import functional
from lrp_prune.engine.call import Call, detached, is_activation
from lrp_prune.engine.forms import Form, form_of
from lrp_prune.engine.rule import Rule

Part = Literal["positive", "negative", "whole"]
_SIGNS: tuple[Part, Part] = ("positive", "negative")


class Term(NamedTuple):
    """A part of the input times a part of the weight, by a factor."""

    input: Part = "whole"
    weight: Part = "whole"
    factor: float = 1.0


class Group(NamedTuple):
    """Terms that share relevance in proportion to their size.

    Args:
        terms: what contributes.
        share: how much of an output's relevance.
        outputs: which outputs, by their sign.
    """

    terms: tuple[Term, ...]
    share: float = 1.0
    outputs: Part = "whole"


class Message(NamedTuple):
    """How relevance comes back to what has certain signs.

    Args:
        input: entries of the input.
        weight: entries of the weight.
        d: the gradient of the output for these; times input and weight it is their relevance.
    """

    input: Part
    weight: Part
    d: Tensor


@dataclass(frozen=True)
class Terms(Rule):
    """A rule for linear layers and convolutions that is declared by its :attr:`groups`; to be subclassed.

    Example:
        Only positive contributions, to outputs of either sign (LRP-z+, Montavon et al. 2017):

        >>> import torch, lrp_prune
        >>> class ZPlus(Terms):
        ...     @property
        ...     def groups(self):
        ...         return (Group((Term("positive", "positive"), Term("negative", "negative"))),)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.ReLU(), torch.nn.Linear(8, 2, bias=False))
        >>> composite = lrp_prune.Composite("z_plus", {"linear": ZPlus()}, base="epsilon")
        >>> with lrp_prune.attributing(model, composite) as propagation:
        ...     value = model(torch.ones(1, 4)).max()
        ...     relevance = propagation.relevance(value)["input"]
        >>> bool((relevance * value.sign() >= 0).all())
        True
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


@dataclass(frozen=True)
class Gamma(Terms):
    r"""The generalised gamma rule favours contributions of the sign of the output by :math:`\gamma`.

    Montavon et al. 2019, for inputs and outputs of either sign Andeol et al. 2021. With 0 it is the plain gradient, and the
    larger it is, the more of what counters the output is left out. Relevance is conserved, but for what biases keep.

    Example:
        >>> import torch, lrp_prune
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 2))
        >>> composite = lrp_prune.Composite("gamma", {"convolution": Gamma(0.25)}, base="epsilon")
        >>> batches = [(torch.randn(16, 1, 4), torch.randint(2, (16,)))]
        >>> list(lrp_prune.attribute(model, batches, composite=composite))
        ['0.weight', '3.weight']
    """

    gamma: float = 0.25

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise ValueError(f"gamma must be at least 0, got {self.gamma}")

    @property
    def groups(self) -> tuple[Group, ...]:
        more = {
            "positive": (Term("positive", "positive", self.gamma), Term("negative", "negative", self.gamma)),
            "negative": (Term("positive", "negative", self.gamma), Term("negative", "positive", self.gamma)),
        }
        return tuple(Group((Term(), *more[sign]), outputs=sign) for sign in _SIGNS)


@dataclass(frozen=True)
class AlphaBeta(Terms):
    r"""Positive contributions get :math:`\alpha` of the relevance, negative ones :math:`-\beta`, with :math:`\alpha - \beta = 1`.

    Bach et al. 2015. With 1 and 0 it is z+. Relevance is conserved where an output has contributions of both signs.
    """

    alpha: float = 2.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise ValueError(f"alpha - beta must be 1 and beta at least 0, got {self.alpha} and {self.beta}")

    @property
    def groups(self) -> tuple[Group, ...]:
        positive = Group((Term("positive", "positive"), Term("negative", "negative")), self.alpha)
        negative = Group((Term("positive", "negative"), Term("negative", "positive")), -self.beta)
        return (positive, negative) if self.beta else (positive,)


gamma, alpha_beta = Gamma(), AlphaBeta()


def part_of(tensor: Tensor, part: Part) -> Tensor:
    """The positive or the negative entries, with zeros for the others; or the whole."""
    if part == "whole":
        return tensor
    return tensor.clamp(min=0) if part == "positive" else tensor.clamp(max=0)


def messages(
    groups: Sequence[Group], form: Form, activation: Tensor, weight: Tensor, d: Tensor, bias: Tensor | None = None
) -> list[Message]:
    """What comes back from the outputs of a product, by groups of terms.

    Args:
        groups: of the rule.
        form: how activation and weight meet.
        activation: the input.
        weight: the weight as it is used.
        d: the gradient that arrives at the output.
        bias: what is added to the product, in a shape that broadcasts to the output.
    """
    inputs, weights = ({sign: part_of(value, sign) for sign in _SIGNS} for value in (activation, weight))
    product = {(s, u): form.product(inputs[s], weights[u]) for s in _SIGNS for u in _SIGNS}
    z = sum(product.values(), torch.zeros_like(d) if bias is None else bias)
    shares = []
    for group in groups:
        factors = {(s, u): _factor(group, s, u) for s in _SIGNS for u in _SIGNS}
        total = sum((factor * product[signs] for signs, factor in factors.items() if factor), torch.zeros_like(d))
        for u in _SIGNS:
            if bias is not None:
                total = total + factors["positive", u] * part_of(bias, u)
        ratio = group.share * (z / total).nan_to_num(0.0, 0.0, 0.0)
        shares.append((factors, ratio if group.outputs == "whole" else ratio * (part_of(z, group.outputs) != 0)))
    found: dict[tuple[float, ...], list[tuple[Part, Part]]] = {}
    for s, u in product:
        found.setdefault(tuple(factors[s, u] for factors, _ in shares), []).append((s, u))
    return [
        Message(s, u, d * sum((factor * ratio for factor, (_, ratio) in zip(key, shares, strict=True)), 0 * z))
        for key, places in found.items()
        for s, u in _merged(places)
        if any(key)
    ]


def _factor(group: Group, s: Part, u: Part) -> float:
    """By what the contributions of these signs are taken."""
    return sum(term.factor for term in group.terms if term.input in (s, "whole") and term.weight in (u, "whole"))


def _merged(places: list[tuple[Part, Part]]) -> list[tuple[Part, Part]]:
    """The same signs in as few parts as possible."""
    if len(places) == 4:
        return [("whole", "whole")]
    if len(places) == 2 and places[0][0] == places[1][0]:
        return [(places[0][0], "whole")]
    if len(places) == 2 and places[0][1] == places[1][1]:
        return [("whole", places[0][1])]
    return places


def input_gradient(found: Sequence[Message], form: Form, activation: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the input; where it is zero, that of positive entries."""
    by_sign: dict[Part, Tensor] = {}
    for sign in _SIGNS:
        parts = [
            form.input_gradient(message.d, activation, part_of(weight, message.weight))
            for message in found
            if message.input in (sign, "whole")
        ]
        by_sign[sign] = sum(parts, torch.zeros_like(activation))
    return torch.where(activation < 0, by_sign["negative"], by_sign["positive"])


def widened(*tensors: Tensor) -> list[Tensor]:
    """The tensors in one precision, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


class Watching(Protocol):
    """Is shown what comes back to a use of a weight."""

    def __call__(
        self, found: list[Message], activation: Tensor, weight: Tensor, d: Tensor, input_gradient: Tensor
    ) -> None: ...


class _Ruled(Function):
    @staticmethod
    def forward(
        ctx: Any, activation: Tensor, weight: Tensor, form: Form, rule: Terms, watching: Watching | None
    ) -> Tensor:
        ctx.save_for_backward(activation, weight)
        ctx.form, ctx.rule, ctx.watching = form, rule, watching
        return functional.own_memory(form.forward(activation, weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        activation, weight = ctx.saved_tensors
        with torch._C.DisableTorchFunction(), torch.autocast(d.device.type, enabled=False):
            a, w, d = widened(activation, weight, d)
            found = messages(ctx.rule.groups, ctx.form, a, w, d, ctx.form.bias(a, w))
            gradient = input_gradient(found, ctx.form, a, w)
            if ctx.watching is not None:
                ctx.watching(found, a, w, d, gradient)
        return gradient.to(activation.dtype), None, None, None, None


def ruled(activation: Tensor, weight: Tensor, form: Form, rule: Terms, watching: Watching | None = None) -> Tensor:
    """The product of an activation and a weight, propagated by terms.

    Args:
        activation: the input.
        weight: the weight, or whatever is constant.
        form: how they meet; it must not hold the activation.
        rule: declares the terms.
        watching: is shown what comes back.
    """
    return _ruled(activation, weight, form, rule, watching)


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
