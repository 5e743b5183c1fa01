"""Messages: how relevance comes back from the outputs of a layer to its inputs and weights, by the terms of a rule."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrp_prune.engine.rules.layers import Layer, constant_like, has_negative
from lrp_prune.engine.rules.signed import Contributions, Passed, factors_of, passed
from lrp_prune.engine.rules.terms import SIGNS, Constant, Group, Part, part_of, power_of_part


class Message(NamedTuple):
    r"""How relevance comes back to what has certain signs: :math:`(s x + c) \, m \, w^p \, d`.

    Args:
        input: entries of the input.
        weight: entries of the weight.
        d: the gradient of the output for these.
        slope: :math:`s`, by what the input is multiplied.
        constant: :math:`c`, in a shape that broadcasts to the input; None for zero.
        power: :math:`p`, of the weight.
        factor: :math:`m`, in a shape that broadcasts to the input; None for one.
    """

    input: Part
    weight: Part
    d: Tensor
    slope: float = 1.0
    constant: Tensor | None = None
    power: int = 1
    factor: Tensor | None = None

    def of_input(self, activation: Tensor) -> Tensor:
        """What the entries of the input contribute, with zeros for those that the message is not about."""
        values = self._of_entries(activation)
        return values if self.factor is None else values * self.factor.to(values.dtype)

    def _of_entries(self, activation: Tensor) -> Tensor:
        if self.constant is None:
            return part_of(activation, self.input)
        scaled = self.slope * activation if self.slope else torch.zeros_like(activation)
        values = scaled + self.constant.to(activation.dtype)
        return values if self.input == "whole" else values * ((activation < 0) == (self.input == "negative"))


class _Share(NamedTuple):
    """What a group takes of entries with certain signs."""

    slope: float = 0.0
    constants: tuple[tuple[Constant, float], ...] = ()
    power: int = 1

    def __bool__(self) -> bool:
        return bool(self.slope or self.constants)


class Arrival(NamedTuple):
    """What comes back from the outputs of a layer, computed when it is asked for.

    Args:
        messages: by the signs of input and weight.
        input_gradient: the gradient of the input, in the precision that it is handed on in; and what relevance is none of it,
            since its entry of the input is zero, or it does not fit. Where that is zero otherwise, it is of positive entries.
    """

    messages: Callable[[], list[Message]]
    input_gradient: Callable[[torch.dtype], tuple[Tensor, Tensor | None]]


def arrival(groups: Sequence[Group], layer: Layer, activation: Tensor, d: Tensor) -> Arrival:
    """What comes back from the outputs of a layer, by groups of terms.

    Args:
        groups: of the rule.
        layer: the layer.
        activation: its input.
        d: the gradient that arrives at the output.

    Raises:
        ValueError: if terms of different kind meet in a way that is no product of input, weight and output.
    """
    signs = SIGNS if has_negative(activation) else SIGNS[:1]
    factors = [entry for group in groups if (entry := factors_of(group)) is not None]
    if len(factors) == len(groups):
        found = passed(groups, factors, Contributions(layer, activation, signs), d)
        return Arrival(lambda: _by_sign(found, signs), lambda dtype: (found.to_input().to(dtype), None))
    made = _by_terms(groups, _Products(groups, layer, activation, signs), d)
    return Arrival(lambda: made, lambda dtype: _input_gradient(made, layer, activation, dtype))


def _by_sign(found: Passed, signs: Sequence[Part]) -> list[Message]:
    """Of groups that look at the sign of contributions alone."""
    of_positive, of_negative = found.by_sign()
    if of_positive is of_negative:
        return [] if of_positive is None else [Message("whole", "whole", of_positive)]
    made = []
    for s in signs:
        of_weights = (of_positive, of_negative) if s == "positive" else (of_negative, of_positive)
        input: Part = s if len(signs) > 1 else "whole"
        made += [
            Message(input, u, gradient) for u, gradient in zip(SIGNS, of_weights, strict=True) if gradient is not None
        ]
    return made


class _Products:
    """The products of parts that terms ask for, each computed once; the whole is their sum where there are all of them."""

    def __init__(self, groups: Sequence[Group], layer: Layer, activation: Tensor, signs: Sequence[Part]) -> None:
        self.layer, self.activation, self.signs = layer, activation, signs
        wanted = {(term.input, term.weight) for group in groups for term in group.terms if term.power == 1}
        self._parted = {(s, u) for s in signs for u in SIGNS} <= wanted
        self._made: dict[tuple[Part | Constant, Part, int], Tensor] = {}

    def of(self, input: Part | Constant, part: Part, power: int = 1) -> Tensor:
        key = (input, part, power)
        if key not in self._made:
            self._made[key] = self._computed(*key)
        return self._made[key]

    def _computed(self, input: Part | Constant, part: Part, power: int) -> Tensor:
        if self._parted and (input, part, power) == ("whole", "whole", 1):
            first, *others = (self.of(s, u) for s in self.signs for u in SIGNS)
            return sum(others, first)
        return self.layer.product(self._entries(input), part, power)

    def output(self) -> Tensor:
        """Product and bias."""
        if self.layer.output is not None:
            return self.layer.output
        whole = self.of("whole", "whole")
        return whole if self.layer.bias is None else whole + self.layer.bias

    def has(self, input: Part | Constant) -> bool:
        """Whether the input has such entries."""
        return input != "negative" or len(self.signs) > 1

    def _entries(self, input: Part | Constant) -> Tensor:
        if isinstance(input, str):
            return part_of(self.activation, input)
        # Not a view of one number: products of several experts at once look at how their operands lie in memory.
        return torch.zeros_like(self.activation) + constant_like(
            self.activation, self.layer.form, input, self.layer.weight.dim()
        )


def _by_terms(groups: Sequence[Group], products: _Products, d: Tensor) -> list[Message]:
    z, layer = products.output(), products.layer
    ratios = []
    for group in groups:
        total = _total(group, products)
        if group.stabilizer:
            total = torch.where(total < 0, total - group.stabilizer, total + group.stabilizer)
        ratio = group.share * (z / total).nan_to_num(0.0, 0.0, 0.0)
        ratios.append(ratio if group.outputs == "whole" else ratio * (part_of(z, group.outputs) != 0))
    found: dict[tuple[_Share, ...], list[tuple[Part, Part]]] = {}
    for s in products.signs:
        for u in SIGNS:
            found.setdefault(tuple(_share(group, s, u) for group in groups), []).append((s, u))
    made = []
    for shares, places in found.items():
        if any(shares):
            slope, constants, power, ratio = _joint(shares, ratios)
            values = [
                factor * constant_like(products.activation, layer.form, value, layer.weight.dim())
                for value, factor in constants
            ]
            constant = sum(values[1:], values[0]) if values else None
            parts = _merged(places)
            if len(products.signs) == 1:
                parts = [("whole", u) for _, u in parts]
            made += [Message(s, u, d * ratio, slope, constant, power) for s, u in parts]
    return made


def _total(group: Group, products: _Products) -> Tensor:
    """The size of all terms of a group together."""
    bias = products.layer.bias
    parts = [
        term.factor * products.of(term.input, term.weight, term.power)
        for term in group.terms
        if products.has(term.input)
    ]
    if bias is not None and group.bias:
        parts += [
            term.factor * power_of_part(bias, term.weight, term.power)
            for term in group.terms
            if term.input != "negative"
        ]
    return sum(parts[1:], parts[0]) if parts else torch.zeros_like(products.output())


def _share(group: Group, s: Part, u: Part) -> _Share:
    """What a group takes of entries with these signs."""
    here = [term for term in group.terms if term.weight in (u, "whole")]
    slope = sum(term.factor for term in here if term.input in (s, "whole"))
    constants = tuple((term.input, term.factor) for term in here if not isinstance(term.input, str))
    powers = {term.power for term in here if term.input in (s, "whole") or not isinstance(term.input, str)}
    if len(powers) > 1:
        raise ValueError(f"the terms of a group have several powers of the same weights, {sorted(powers)}: part them")
    return _Share(float(slope), constants, powers.pop() if powers else 1)


def _joint(
    shares: Sequence[_Share], ratios: Sequence[Tensor]
) -> tuple[float, tuple[tuple[Constant, float], ...], int, Tensor]:
    """What all groups take together."""
    taking = [(share, ratio) for share, ratio in zip(shares, ratios, strict=True) if share]
    (first, ratio), others = taking[0], taking[1:]
    if first.constants and not others:
        return first.slope, first.constants, first.power, ratio
    if any(share.constants or share.power != first.power for share, _ in taking):
        raise ValueError("terms with a constant, or with another power of the weight, must be in a group of their own")
    return 1.0, (), first.power, sum((share.slope * ratio for share, ratio in others), first.slope * ratio)


def _merged(places: list[tuple[Part, Part]]) -> list[tuple[Part, Part]]:
    """The same signs in as few parts as possible."""
    if len(places) == 4:
        return [("whole", "whole")]
    if len(places) == 2 and places[0][0] == places[1][0]:
        return [(places[0][0], "whole")]
    if len(places) == 2 and places[0][1] == places[1][1]:
        return [("whole", places[0][1])]
    return places


def _input_gradient(
    found: Sequence[Message], layer: Layer, activation: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Of messages, whatever they are: see :class:`Arrival`."""
    scaling = [message for message in found if message.constant is None]
    fixed = [message for message in found if message.constant is not None]
    gradient = _gradient(scaling, "whole", layer, activation)
    if any(message.input != "whole" for message in scaling):
        positive, negative = (_gradient(scaling, sign, layer, activation) for sign in SIGNS)
        is_negative = (activation < 0).to(activation.dtype)
        # Exact where it is one or zero, and many times faster than torch.where.
        gradient = gradient + torch.lerp(positive, negative, is_negative)
    if not fixed:
        return gradient.to(dtype), None
    relevance = torch.zeros_like(activation)
    for message in fixed:
        values = message.of_input(activation)
        relevance += values * layer.input_gradient(message.d, activation, message.weight, message.power)
    beside = (relevance / activation).to(dtype)
    carried = beside.isfinite() | ~relevance.isfinite()  # what is wrong must be seen
    gradient = gradient.to(dtype) + beside.masked_fill(~carried, 0.0)
    return gradient, relevance.masked_fill(carried, 0.0)


def _gradient(found: Iterable[Message], input: Part, layer: Layer, activation: Tensor) -> Tensor:
    """What the gradient of the input has from messages about a part of it."""
    parts = [
        layer.input_gradient(message.d, activation, message.weight, message.power)
        for message in found
        if message.input == input
    ]
    return sum(parts[1:], parts[0]) if parts else torch.zeros_like(activation)
