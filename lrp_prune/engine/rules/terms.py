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
of the output, one for each sign of the input and of the weight (:class:`~lrp_prune.engine.rules.messages.Message`).
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lrp_prune.arguments import check_integer, check_number

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


def part_of(tensor: Tensor, part: Part) -> Tensor:
    """The positive or the negative entries, with zeros for the others; or the whole."""
    if part == "whole":
        return tensor
    return tensor.clamp(min=0) if part == "positive" else tensor.clamp(max=0)


def power_of_part(tensor: Tensor, part: Part, power: int) -> Tensor:
    """A power of some entries, with zeros for the others."""
    if power:
        found = part_of(tensor, part)
        return found if power == 1 else found.pow(power)
    if part == "whole":
        return torch.ones_like(tensor)
    sign = tensor.sign()
    return sign.clamp_(min=0) if part == "positive" else sign.clamp_(max=0).neg_()
