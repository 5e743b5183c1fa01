r"""Terms: how a rule for a product of an activation with a weight is declared, and what relevance follows from it.

With :math:`z_j = \sum_i x_i w_{ji} + b_j`, a rule gives the input ``i`` of the output ``j``, and so the weight between them,

.. math:: R_{ji} = \sum_g \lambda_g \frac{n^g_{ji}}{\sum_i n^g_{ji} + b^g_j + \epsilon_g} R_j,
    \qquad n^g_{ji} = \sum_{t \in g} f_t \, u_t(x_i) \, v_t(w_{ji})

where each *term* ``t`` takes a part of the input (its positive or negative entries, the whole, or a constant in its place) and
a power of a part of the weight by a factor, and the terms of a *group* ``g`` share :math:`\lambda_g` of the relevance of those
outputs that the group is for. The stabiliser :math:`\epsilon_g` has the sign of what it is added to. A bias is the weight of an
input that is always one, and keeps what it gets. Where nothing contributes to a group, its share is lost.

At given signs of input, weight and output a message :math:`R_{ji}` is a function of the input times one of the weight times
what the output alone tells. So the relevance of inputs and of weights, in every statistic, follows from at most four gradients
of the output, one for each sign of the input and of the weight (:class:`Message`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lrp_prune.arguments import check_integer, check_number
from lrp_prune.engine.forms import Form

Part = Literal["positive", "negative", "whole"]
Constant = float | tuple[float, ...]
"""What stands in the place of every entry of an input; several are one for each channel."""
SIGNS: tuple[Part, Part] = ("positive", "negative")


def _check_part(name: str, value: Any) -> None:
    if value not in get_args(Part):
        raise ValueError(f"{name} must be one of {get_args(Part)}, got {value!r}")


@dataclass(frozen=True)
class Term:
    """A part of the input times a power of a part of the weight, by a factor.

    Args:
        input: entries of the input, or a constant in their place.
        weight: entries of the weight.
        factor: by what the product is multiplied.
        power: of the weight's entries; with 0 each of them is one, zeros as well.

    Raises:
        ValueError: for a part that there is not, or what is no number.
    """

    input: Part | Constant = "whole"
    weight: Part = "whole"
    factor: float = 1.0
    power: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.input, str):
            _check_part("input", self.input)
        else:
            for value in self.input if isinstance(self.input, tuple) else (self.input,):
                check_number("input", value, "(-inf, inf)")
        _check_part("weight", self.weight)
        check_number("factor", self.factor, "(-inf, inf)")
        check_integer("power", self.power, 0)


@dataclass(frozen=True)
class Group:
    """Terms that share relevance in proportion to their size.

    Args:
        terms: what contributes.
        share: how much of an output's relevance.
        outputs: which outputs, by their sign.
        stabilizer: what is added to the size of all terms together, with their sign.
        bias: whether a bias contributes, and keeps its share.

    Raises:
        ValueError: if there is no term, or for a part that there is not, or what is no number.
    """

    terms: tuple[Term, ...]
    share: float = 1.0
    outputs: Part = "whole"
    stabilizer: float = 0.0
    bias: bool = True

    def __post_init__(self) -> None:
        if not self.terms or not all(isinstance(term, Term) for term in self.terms):
            raise ValueError(f"terms must be one Term or several, in a tuple, got {self.terms!r}")
        _check_part("outputs", self.outputs)
        check_number("share", self.share, "(-inf, inf)")
        check_number("stabilizer", self.stabilizer, "[0, inf)")


class Message(NamedTuple):
    r"""How relevance comes back to what has certain signs: :math:`(s x + c) \, w^p \, d`.

    Args:
        input: entries of the input.
        weight: entries of the weight.
        d: the gradient of the output for these.
        slope: :math:`s`, by what the input is multiplied.
        constant: :math:`c`, in a shape that broadcasts to the input; None for zero.
        power: :math:`p`, of the weight.
    """

    input: Part
    weight: Part
    d: Tensor
    slope: float = 1.0
    constant: Tensor | None = None
    power: int = 1

    def of_input(self, activation: Tensor) -> Tensor:
        """What the entries of the input contribute, with zeros for those that the message is not about."""
        if self.constant is None:
            return part_of(activation, self.input)
        scaled = self.slope * activation if self.slope else torch.zeros_like(activation)
        values = scaled + self.constant.to(activation.dtype)
        return values if self.input == "whole" else values * ((activation < 0) == (self.input == "negative"))

    def of_weight(self, weight: Tensor) -> Tensor:
        """What the entries of the weight contribute."""
        return power_of_part(weight, self.weight, self.power)


class _Share(NamedTuple):
    """What a group takes of entries with certain signs."""

    slope: float = 0.0
    constants: tuple[tuple[Constant, float], ...] = ()
    power: int = 1

    def __bool__(self) -> bool:
        return bool(self.slope or self.constants)


def part_of(tensor: Tensor, part: Part) -> Tensor:
    """The positive or the negative entries, with zeros for the others; or the whole."""
    if part == "whole":
        return tensor
    return tensor.clamp(min=0) if part == "positive" else tensor.clamp(max=0)


def power_of_part(tensor: Tensor, part: Part, power: int) -> Tensor:
    """A power of some entries, with zeros for the others."""
    found = part_of(tensor, part)
    if power:
        return found if power == 1 else found.pow(power)
    return torch.ones_like(tensor) if part == "whole" else (found != 0).to(tensor.dtype)


class _Products:
    """The products of parts that terms ask for, each computed once; the whole is their sum where there are all of them."""

    def __init__(self, groups: Sequence[Group], form: Form, activation: Tensor, weight: Tensor) -> None:
        self._form, self._activation, self._weight = form, activation, weight
        self.signs = SIGNS if bool((activation < 0).any()) else SIGNS[:1]
        """Of the input: after a ReLU the half is computed."""
        wanted = {(term.input, term.weight) for group in groups for term in group.terms if term.power == 1}
        self._parted = {(s, u) for s in self.signs for u in SIGNS} <= wanted
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
        return self._form.product(self._entries(input), power_of_part(self._weight, part, power))

    def has(self, input: Part | Constant) -> bool:
        """Whether the input has such entries."""
        return input != "negative" or len(self.signs) > 1

    def _entries(self, input: Part | Constant) -> Tensor:
        if isinstance(input, str):
            return part_of(self._activation, input)
        # Not a view of one number: products of several experts at once look at how their operands lie in memory.
        return torch.zeros_like(self._activation) + constant_like(
            self._activation, self._form, input, self._weight.dim()
        )


def constant_like(activation: Tensor, form: Form, constant: Constant, weight_dims: int) -> Tensor:
    """A constant in a shape that broadcasts to the input.

    Raises:
        ValueError: if it is one for each channel, and the input has other channels, or none that can be told.
    """
    if not isinstance(constant, tuple):
        return activation.new_full((1,) * activation.dim(), constant)
    after = 0 if form.channel_dim == -1 else weight_dims - 2
    channels = activation.shape[activation.dim() - 1 - after] if form.channel_dim is not None else None
    if channels != len(constant):
        raise ValueError(
            f"a rule has a constant for each of {len(constant)} channels, and the input has "
            f"{'none that can be told' if channels is None else channels}: give one number, or one for each channel"
        )
    return activation.new_tensor(constant).reshape(-1, *(1,) * after)


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

    Raises:
        ValueError: if terms of different kind meet in a way that is no product of input, weight and output.
    """
    products = _Products(groups, form, activation, weight)
    z = products.of("whole", "whole")
    z = z if bias is None else z + bias
    ratios = []
    for group in groups:
        total = _total(group, products, bias)
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
            values = [factor * constant_like(activation, form, value, weight.dim()) for value, factor in constants]
            constant = sum(values[1:], values[0]) if values else None
            parts = _merged(places)
            if len(products.signs) == 1:
                parts = [("whole", u) for _, u in parts]
            made += [Message(s, u, d * ratio, slope, constant, power) for s, u in parts]
    return made


def _total(group: Group, products: _Products, bias: Tensor | None) -> Tensor:
    """The size of all terms of a group together."""
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
    return sum(parts[1:], parts[0]) if parts else torch.zeros_like(products.of("whole", "whole"))


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


def input_gradient(
    found: Sequence[Message], form: Form, activation: Tensor, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the input; and what relevance is none of it, since its entry of the input is zero.

    Where the input is zero, and there is no such relevance, it is the gradient of positive entries.

    Args:
        dtype: in which the gradient is handed on; relevance that does not fit into it is handed back.
    """
    scaling = [message for message in found if message.constant is None]
    fixed = [message for message in found if message.constant is not None]
    gradient = _gradient(scaling, "whole", form, activation, weight)
    if any(message.input != "whole" for message in scaling):
        positive, negative = (_gradient(scaling, sign, form, activation, weight) for sign in SIGNS)
        gradient = gradient + torch.where(activation < 0, negative, positive)
    if not fixed:
        return gradient.to(dtype), None
    relevance = torch.zeros_like(activation)
    for message in fixed:
        values = message.of_input(activation)
        relevance += values * form.input_gradient(message.d, activation, message.of_weight(weight))
    beside = (relevance / activation).to(dtype)
    carried = beside.isfinite() | ~relevance.isfinite()  # what is wrong must be seen
    gradient = gradient.to(dtype) + beside.masked_fill(~carried, 0.0)
    return gradient, relevance.masked_fill(carried, 0.0)


def _gradient(found: Iterable[Message], input: Part, form: Form, activation: Tensor, weight: Tensor) -> Tensor:
    """What the gradient of the input has from messages about a part of it."""
    parts = [
        form.input_gradient(message.d, activation, message.of_weight(weight))
        for message in found
        if message.input == input
    ]
    return sum(parts[1:], parts[0]) if parts else torch.zeros_like(activation)


def widened(*tensors: Tensor) -> list[Tensor]:
    """The tensors in one precision, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]
