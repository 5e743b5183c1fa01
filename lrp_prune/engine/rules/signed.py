r"""Rules that tell contributions apart by their sign alone: :math:`n_{ji} = f^\pm (x_i w_{ji})^\pm`, as gamma, z+ and alpha-beta.

With :math:`p_j = \sum_i (x_i w_{ji})^+ + b_j^+` the sum of what is positive, all of it follows from the output :math:`z_j` and
:math:`p_j` wherever nothing cancels out: where the output has the sign of what a group favours. So one product takes the place
of one for each part of input and weight, and elementwise work is done by few and fast functions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrp_prune.engine.rules.layers import Layer
from lrp_prune.engine.rules.terms import SIGNS, Group, Part, part_of


class Factors(NamedTuple):
    """By what a group multiplies contributions of either sign."""

    positive: float
    negative: float


def factors_of(group: Group) -> Factors | None:
    """What a group multiplies contributions by, if it looks at nothing but their sign."""
    if any(term.power != 1 or not isinstance(term.input, str) for term in group.terms):
        return None
    found = {
        (s, u): sum(term.factor for term in group.terms if term.input in (s, "whole") and term.weight in (u, "whole"))
        for s in SIGNS
        for u in SIGNS
    }
    positive = {found["positive", "positive"], found["negative", "negative"]}
    negative = {found["positive", "negative"], found["negative", "positive"]}
    return Factors(positive.pop(), negative.pop()) if len(positive) == len(negative) == 1 else None


class Contributions:
    """The sums of positive and of negative contributions, each computed once, and the output.

    Args:
        layer: the layer.
        activation: its input.
        signs: that the input has.
    """

    def __init__(self, layer: Layer, activation: Tensor, signs: Sequence[Part]) -> None:
        self._layer, self._activation, self._signs = layer, activation, signs
        self._sums: dict[Part, Tensor] = {}

    def of_sign(self, sign: Part, bias: bool) -> Tensor:
        """What is positive, or negative, with the bias or without."""
        if sign not in self._sums:
            parts = [
                self._layer.product(
                    self._activation if len(self._signs) == 1 else part_of(self._activation, s),
                    sign if s == "positive" else _other(sign),
                )
                for s in self._signs
            ]
            self._sums[sign] = sum(parts[1:], parts[0])
        found, added = self._sums[sign], self._layer.bias
        return found if added is None or not bias else found + part_of(added, sign)

    def output(self, bias: bool = True) -> Tensor:
        """Product and bias, or the product alone."""
        layer = self._layer
        if layer.output is None:
            whole = (
                self._sums["positive"] + self._sums["negative"]
                if len(self._sums) == 2
                else layer.product(self._activation)
            )
            layer.output = whole if layer.bias is None else whole + layer.bias
        return layer.output if bias or layer.bias is None else layer.output - layer.bias


def _other(sign: Part) -> Part:
    return "negative" if sign == "positive" else "positive"


def passed(
    groups: Sequence[Group], factors: Sequence[Factors], sums: Contributions, d: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients that positive and negative contributions have; the same tensor where they have the same, None for zero.

    Args:
        groups: of the rule.
        factors: of each of them.
        sums: the contributions.
        d: the gradient that arrives at the output.
    """
    if _mirrored(groups, factors):
        return _of_favoured(groups[0], factors[0], sums, d)
    for group, (positive, negative) in zip(groups, factors, strict=True):
        if len(groups) > 1 and _needs_both(group, positive, negative):
            sums.of_sign("positive", bias=False)  # ahead of the output, which is their sum
            sums.of_sign("negative", bias=False)
    of_positive: list[Tensor] = []
    of_negative: list[Tensor] = []
    z = sums.output()
    same = all(positive == negative for positive, negative in factors)
    for group, (positive, negative) in zip(groups, factors, strict=True):
        total = _total(group, positive, negative, sums)
        ratio = _stable_ratio(z, total, group.stabilizer)
        if group.outputs != "whole":
            sign = z.sign()
            ratio *= sign.clamp_(min=0) if group.outputs == "positive" else sign.clamp_(max=0).neg_()
        if positive:
            of_positive.append(ratio * (positive * group.share))
        if negative and not same:
            of_negative.append(ratio * (negative * group.share))
    first, second = (_summed(parts, d) for parts in (of_positive, of_negative))
    return first, first if same else second


def _summed(parts: list[Tensor], d: Tensor) -> Tensor | None:
    return sum(parts[1:], parts[0]).mul_(d) if parts else None


def _needs_both(group: Group, positive: float, negative: float) -> bool:
    """Whether a group's sum does not follow from the output and what is positive."""
    if positive == negative or not negative:
        return False
    return not (group.outputs == "positive" and positive >= negative >= 0)


def _total(group: Group, positive: float, negative: float, sums: Contributions) -> Tensor:
    """The size of all terms of a group together."""
    bias = group.bias
    if positive == negative:
        return sums.output(bias) * positive if positive != 1 else sums.output(bias)
    if not negative:
        return positive * sums.of_sign("positive", bias)
    if not positive:
        return negative * sums.of_sign("negative", bias)
    if group.outputs == "positive" and positive >= negative >= 0:
        return negative * sums.output(bias) + (positive - negative) * sums.of_sign("positive", bias)
    return positive * sums.of_sign("positive", bias) + negative * sums.of_sign("negative", bias)


def _stable_ratio(z: Tensor, total: Tensor, stabilizer: float) -> Tensor:
    """``z / total``, and zero where there is nothing to share by."""
    if stabilizer:
        total = total + torch.copysign(total.new_tensor(stabilizer), total + 0.0)  # the sign of zero is one
    return (z / total).nan_to_num_(0.0, 0.0, 0.0)


def _mirrored(groups: Sequence[Group], factors: Sequence[Factors]) -> bool:
    """Whether a rule favours what has the sign of the output, whichever that is, as gamma does."""
    if len(groups) != 2 or [group.outputs for group in groups] != list(SIGNS):
        return False
    (one, two), (first, second) = factors, groups
    alike = (first.share, first.stabilizer) == (second.share, second.stabilizer) and first.bias and second.bias
    return alike and one == (two.negative, two.positive) and one.positive >= one.negative >= 0


def _of_favoured(group: Group, factors: Factors, sums: Contributions, d: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What contributions of either sign have where those of the output's sign ``s`` are multiplied by more than the others.

    With ``z`` the output, ``p`` what is positive, ``a`` and ``b`` the factors, all terms of the sum have the output's sign:
    ``b z + (a - b) p`` where it is positive, ``b z + (a - b) (z - p)`` elsewhere.
    """
    more, less = factors
    difference = more - less
    z = sums.output()
    if not difference:
        total = z * less if less != 1 else z
    else:
        total = torch.addcmul(less * z, z.sign(), sums.of_sign("positive", bias=True), value=difference)
        total.add_(z.clamp(max=0), alpha=difference)
    ratio = _stable_ratio(z, total, group.stabilizer).mul_(d)
    if group.share != 1:
        ratio *= group.share
    if not difference:
        ratio *= less
        return ratio, ratio
    lean = ratio * z.sign()
    ratio *= (more + less) / 2
    return ratio.add(lean, alpha=difference / 2), ratio.sub_(lean, alpha=difference / 2)
