r"""Rules that tell contributions apart by their sign alone: :math:`n_{ji} = f^\pm (x_i w_{ji})^\pm`, as gamma, z+ and alpha-beta.

With :math:`m = (f^+ + f^-) / 2` and :math:`h = (f^+ - f^-) / 2` such a share of a contribution is :math:`m c + h |c|`. So the
size of all terms together follows from the output :math:`z_j` and one more product, :math:`q_j = \sum_i |x_i w_{ji}| + |b_j|`,
and the gradient of the input from two, whatever the signs of the input and of the weight: by the weight, and by its absolute
values. Where ``m z`` and ``h q`` cancel each other out nearly, as they do where hardly anything counters an output, everything
is computed by parts of input and weight instead, so that no digits are lost.

One group of terms over an input without negative entries is the plain rule of the weight :math:`f^+ w^+ + f^- w^-`, which takes
one gradient. So is gamma where nothing arrives at outputs of one sign, as before a ReLU.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lrp_prune.engine.rules.layers import Layer, Taken, taken_of
from lrp_prune.engine.rules.terms import SIGNS, Group, Part, part_of

_CANCELLED = 1 / 32
"""Which share of its summands' size a sum keeps at least: five bits are lost."""


class Factors(NamedTuple):
    """By what a group multiplies contributions of either sign."""

    positive: float
    negative: float

    @property
    def mean(self) -> float:
        """Of both, by which a contribution is multiplied."""
        return (self.positive + self.negative) / 2

    @property
    def lean(self) -> float:
        """Half of the difference, by which its absolute value is."""
        return (self.positive - self.negative) / 2


Signs = tuple[Tensor | None, Tensor | None]


class Passed(NamedTuple):
    """What comes back from the outputs, computed when it is asked for.

    Args:
        by_sign: the gradients of the output that positive and negative contributions have; the same tensor where they have the
            same, None for zero.
        to_input: the gradient of the input; where that is zero, the one of positive entries.
    """

    by_sign: Callable[[], Signs]
    to_input: Callable[[], Tensor]


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
    return Factors(float(positive.pop()), float(negative.pop())) if len(positive) == len(negative) == 1 else None


class Contributions:
    """The sums of contributions by what is taken of them, each computed once, and the output.

    Args:
        layer: the layer.
        activation: its input.
        signs: that the input has.
    """

    def __init__(self, layer: Layer, activation: Tensor, signs: Sequence[Part]) -> None:
        self.layer, self.activation, self.signs = layer, activation, signs
        self._sums: dict[Taken, Tensor] = {}

    @property
    def mixed(self) -> bool:
        """Whether the input has entries of both signs."""
        return len(self.signs) > 1

    def output(self, bias: bool = True) -> Tensor:
        """Product and bias, or the product alone."""
        layer = self.layer
        if layer.output is None:
            product = layer.product(self.activation)
            layer.output = product if layer.bias is None else product + layer.bias
        return layer.output if bias or layer.bias is None else layer.output - layer.bias

    def absolute(self, bias: bool) -> Tensor:
        """The size of all contributions."""
        values = self.activation.abs() if self.mixed else self.activation
        return self._sum("absolute", bias, lambda: self.layer.product(values, "absolute"))

    def weighted(self, taken: Taken, bias: bool) -> Tensor:
        """What is taken of the weight, times an input without negative entries."""
        return self._sum(taken, bias, lambda: self.layer.product(self.activation, taken))

    def of_sign(self, sign: Part, bias: bool) -> Tensor:
        """What is positive, or negative."""
        if not self.mixed:
            return self.weighted(sign, bias)
        return self._sum(
            sign,
            bias,
            lambda: (
                self.layer.product(part_of(self.activation, "positive"), sign)
                + self.layer.product(part_of(self.activation, "negative"), _other(sign))
            ),
        )

    def _sum(self, taken: Taken, bias: bool, make: Callable[[], Tensor]) -> Tensor:
        if taken not in self._sums:
            self._sums[taken] = make()
        found, added = self._sums[taken], self.layer.bias
        return found if added is None or not bias else found + taken_of(added, taken)


def _other(sign: Part) -> Part:
    return "negative" if sign == "positive" else "positive"


def passed(groups: Sequence[Group], factors: Sequence[Factors], sums: Contributions, d: Tensor) -> Passed:
    """What comes back from the outputs of a layer.

    Args:
        groups: of the rule.
        factors: of each of them.
        sums: the contributions.
        d: the gradient that arrives at the output.
    """
    if not sums.mixed:
        groups, factors = _reached(groups, factors, sums, d)
    if not groups:
        return Passed(lambda: (None, None), lambda: torch.zeros_like(sums.activation))
    if len(groups) == 1 and (not sums.mixed or factors[0].positive == factors[0].negative):
        return _by_one_weight(groups[0], factors[0], sums, d)
    found = _of_favoured(groups, factors, sums, d) if _mirrored(groups, factors) else _of_both(groups, factors, sums, d)
    if found is None:
        return _by_parts(groups, factors, sums, d)
    return _by_two_weights(*found, sums)


def _reached(
    groups: Sequence[Group], factors: Sequence[Factors], sums: Contributions, d: Tensor
) -> tuple[Sequence[Group], Sequence[Factors]]:
    """Without groups for outputs of a sign that nothing arrives at."""
    if all(group.outputs == "whole" for group in groups):
        return groups, factors
    for sign in reversed(SIGNS):
        if not bool((part_of(sums.output(), sign) * d).any()):
            left = [(replace(g, outputs="whole"), f) for g, f in zip(groups, factors, strict=True) if g.outputs != sign]
            return [group for group, _ in left], [entry for _, entry in left]
    return groups, factors


def _by_one_weight(group: Group, factors: Factors, sums: Contributions, d: Tensor) -> Passed:
    """Where one weight takes the place of all parts: see above."""
    positive, negative = factors
    taken: Taken
    if positive == negative:
        taken, size = "whole", positive
    elif not positive:
        taken, size = "negative", negative
    else:
        taken, size = negative / positive or "positive", positive
    total = sums.output(group.bias) if taken == "whole" else sums.weighted(taken, group.bias)
    common = _shared(group, total * size if size != 1 else total, sums, d)

    def by_sign() -> Signs:
        first = common * positive if positive else None
        return first, first if positive == negative else common * negative if negative else None

    return Passed(by_sign, lambda: sums.layer.input_gradient(common * size, sums.activation, taken))


def _shared(group: Group, total: Tensor, sums: Contributions, d: Tensor) -> Tensor:
    """``share z / total d``, for the outputs that a group is for."""
    z = sums.output()
    if group.stabilizer:
        total = total + torch.copysign(total.new_tensor(group.stabilizer), total + 0.0)  # the sign of zero is one
    ratio = (z / total).nan_to_num_(0.0, 0.0, 0.0).mul_(d)  # zero where there is nothing to share by
    if group.outputs != "whole":
        sign = z.sign()
        ratio *= sign.clamp_(min=0) if group.outputs == "positive" else sign.clamp_(max=0).neg_()
    return ratio if group.share == 1 else ratio.mul_(group.share)


def _mirrored(groups: Sequence[Group], factors: Sequence[Factors]) -> bool:
    """Whether a rule favours what has the sign of the output, whichever that is, as gamma does."""
    if len(groups) != 2 or [group.outputs for group in groups] != list(SIGNS):
        return False
    (one, two), (first, second) = factors, groups
    alike = (first.share, first.stabilizer) == (second.share, second.stabilizer) and first.bias and second.bias
    return alike and one == (two.negative, two.positive) and one.positive >= one.negative >= 0


def _of_favoured(
    groups: Sequence[Group], factors: Sequence[Factors], sums: Contributions, d: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of contributions and of their absolute values under a mirrored rule.

    The size of all terms is ``m z + h sign(z) q``, of which both have the output's sign.
    """
    z, lean = sums.output(), factors[0].lean
    sign = z.sign()
    total = torch.addcmul(z * factors[0].mean, sign, sums.absolute(bias=True), value=lean)
    ratio = _shared(replace(groups[0], outputs="whole"), total, sums, d)
    return ratio * factors[0].mean, sign.mul_(ratio).mul_(lean)


def _of_both(
    groups: Sequence[Group], factors: Sequence[Factors], sums: Contributions, d: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The gradients of contributions and of their absolute values; None where sums cancel out, or one sign has nothing."""
    if not all(any(entry) for entry in zip(*factors, strict=True)):
        return None
    means, leans = [], []
    for group, entry in zip(groups, factors, strict=True):
        total = sums.output(group.bias) * entry.mean
        if entry.lean:
            size = sums.absolute(group.bias)
            total.add_(size, alpha=entry.lean)
            least = _CANCELLED * (abs(entry.mean) + abs(entry.lean))
            if bool(total.abs().sub_(size, alpha=least).clamp_(max=0).mul_(d).any()):
                return None
        ratio = _shared(group, total, sums, d)
        means.append(ratio * entry.mean)
        leans.append(ratio * entry.lean)
    return sum(means[1:], means[0]), sum(leans[1:], leans[0])


def _by_two_weights(of_contribution: Tensor, of_absolute: Tensor, sums: Contributions) -> Passed:
    """Contributions by the weight, and their absolute values by those of the weight."""
    layer, activation = sums.layer, sums.activation

    def to_input() -> Tensor:
        absolute = layer.input_gradient(of_absolute, activation, "absolute")
        if sums.mixed:
            absolute *= (activation < 0).to(absolute.dtype).mul_(-2).add_(1)
        return absolute.add_(layer.input_gradient(of_contribution, activation, "whole"))

    return Passed(lambda: (of_contribution + of_absolute, of_contribution - of_absolute), to_input)


def _by_parts(groups: Sequence[Group], factors: Sequence[Factors], sums: Contributions, d: Tensor) -> Passed:
    """By a product for each part of the input and of the weight."""
    layer, activation = sums.layer, sums.activation
    parts: tuple[list[Tensor], list[Tensor]] = [], []
    for group, entry in zip(groups, factors, strict=True):
        sizes = [f * sums.of_sign(s, group.bias) for s, f in zip(SIGNS, entry, strict=True) if f]
        ratio = _shared(group, _summed(sizes) if sizes else torch.zeros_like(d), sums, d)
        for found, factor in zip(parts, entry, strict=True):
            if factor:
                found.append(ratio * factor)
    signs = _summed(parts[0]) if parts[0] else None, _summed(parts[1]) if parts[1] else None

    def of_entries(sign: Part) -> Tensor:
        weights: tuple[Part, Part] = (sign, _other(sign))
        found = [
            layer.input_gradient(of_sign, activation, u)
            for of_sign, u in zip(signs, weights, strict=True)
            if of_sign is not None
        ]
        return _summed(found) if found else torch.zeros_like(activation)

    def to_input() -> Tensor:
        positive = of_entries("positive")
        if not sums.mixed:
            return positive
        # Exact where it is one or zero, and many times faster than torch.where.
        return torch.lerp(positive, of_entries("negative"), (activation < 0).to(activation.dtype))

    return Passed(lambda: signs, to_input)


def _summed(tensors: Sequence[Tensor]) -> Tensor:
    return sum(tensors[1:], tensors[0])
