r"""Statistics: how relevance at the uses of weights and units is reduced over tokens and samples, and how it is read.

With the activation ``a`` ``[tokens, in]`` and the propagated gradient ``d`` ``[tokens, out]`` of a use, the relevance of a
weight at a token is :math:`R_{ji} = W_{ji} \, a_i \, d_j` (SparC3, arXiv 2506.13727, eq. 8, in gradient form). Summed are

=================  ==========================================================================
``signed``         :math:`W \cdot (d^T a)`
``abs_sample``     :math:`\sum_\mathrm{samples} |W \cdot (d^T a)|`
``abs_token``      :math:`|W| \cdot (|d|^T |a|)`
``pxp``            as ``abs_sample`` where a convolution reads, whose maps are summed first; elsewhere as ``abs_token``
``squared_token``  :math:`W^2 \cdot ((d^2)^T a^2)`, of which the square root is read
``geometric``      :math:`|W|^3 \cdot ((d^2)^T a^2)`, read together with the sums of :math:`a^2`
``input_norm``     :math:`W^2 \cdot (1^T a^2)`, of which the square root is read (Wanda, arXiv 2306.11695)
``activation``     of units alone: :math:`1^T a^2`, of which the square root is read
=================  ==========================================================================

``geometric`` is the weighted geometric mean :math:`R^{2/3} C^{1/3}` of relevance as in ``squared_token`` and of what
a weight contributes to its layer's output, :math:`|W_{ji}| \, \|a_i\|_2` (all that Wanda looks at), as a share of the
mean contribution in its tensor. Relevance vanishes where a softmax or a gate is saturated, although removing the
weights would end the saturation; a contribution does not, but says nothing of what becomes of it.

``pxp`` is how Pruning by eXplaining (arXiv 2408.12568) ranks what it prunes: filters by
:math:`\sum_\mathrm{samples} |\sum_\mathrm{positions} R|`, neurons of a ViT's linear layers by
:math:`\sum_\mathrm{samples, tokens} |R|`, and heads by the relevance of their attention patterns ``A``,
:math:`\sum_{\mathrm{samples}, q} |\sum_k R_{A, qk}|`. With :math:`o_q = \sum_k A_{qk} v_k` the inner sum is
:math:`\sum_k A_{qk} (v_k \cdot d_q) = o_q \cdot d_q`, what the head writes times what is propagated to it: the relevance of
the head at a token, up to the factor by which a composite shares it between pattern and values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistic:
    r"""What is summed of relevance, :math:`\sum |R|^p` over tokens and samples, and how the sums are read.

    A mean over samples is read, and of it the root that makes it as large as relevance again.

    Args:
        name: what results are labelled with.
        power: :math:`p`, the power of absolute relevance at each token; 0 for relevance itself, with its sign.
        by_sample: whether the sum over a sample's tokens is taken before the absolute value is.
        by_map: whether that is so where a convolution reads, of whose maps the tokens are positions, and only there.
        weighing: of activations, whether they are multiplied with the weights that read them.
        propagated: whether relevance is looked at, or what the forward alone tells: activations in its place.
        contributing: whether the weights' contributions to their layers' outputs are a factor (of weights only).
        counted: whether anything is summed at all, or only found.

    Raises:
        ValueError: if the power is negative, or given together with what it cannot go with.

    Example:
        The cubes of relevance at each token, in which large values count more than in squares:

        >>> import lrp_prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batches = [(torch.randn(16, 4), torch.randint(2, (16,)))]
        >>> lrp_prune.attribute(model, batches, statistic=Statistic("cubed_token", power=3)).statistic
        'cubed_token'
    """

    name: str
    power: int = 0
    by_sample: bool = False
    by_map: bool = False
    weighing: bool = True
    propagated: bool = True
    contributing: bool = False
    counted: bool = True

    def __post_init__(self) -> None:
        whole = isinstance(self.power, int) and not isinstance(self.power, bool)
        if not whole or self.power < 0 or (self.by_sample and self.power):
            raise ValueError(
                f"statistic {self.name!r}: power must be a whole number of at least 0, and 0 where samples are summed first, "
                f"got {self.power}"
            )
        if not self.propagated and self.counted and (self.power != 2 or self.by_sample or self.contributing):
            raise ValueError(
                f"statistic {self.name!r}: of inputs alone (propagated=False) there are squares, power=2, summed over tokens"
            )
        if self.by_map and (self.power != 1 or not self.propagated or self.contributing):
            raise ValueError(
                f"statistic {self.name!r}: by_map=True is about absolute relevance, power=1, without contributions"
            )
        if self.contributing and not self.power:
            raise ValueError(
                f"statistic {self.name!r}: contributing=True is a factor of powers, so power must be at least 1"
            )

    @classmethod
    def named(cls, name: str) -> "Statistic":
        """The statistic of a name; scores that are none of relevance (``magnitude``, ``random``) are read as they are."""
        return STATISTICS.get(name) or cls(name, power=1)

    def check_suits(self, granularity: str) -> None:
        """Refuse units where the statistic is about weights, and weights where it is about units.

        Raises:
            ValueError: if so.
        """
        if not self.weighing and granularity in ("weight", "embedding"):
            raise ValueError(f"statistic {self.name!r} is about units, not {granularity}s: use 'input_norm'")
        if self.contributing and granularity != "weight":
            raise ValueError(f"statistic {self.name!r} is about weights, not {granularity}s: use 'squared_token'")

    @property
    def signed(self) -> bool:
        """Whether values have a sign."""
        return self.power == 0 and not self.by_sample

    @property
    def root(self) -> int:
        """The root that is read: that of all powers together."""
        return max(self.power, 1) + self.contributing

    @property
    def of_magnitudes(self) -> bool:
        """Whether nothing cancels: rounding the gradients changes it no more than rounding what is multiplied."""
        return self.propagated and self.power > 0 and not self.by_map

    @property
    def backward_needed(self) -> bool:
        """Whether relevance has to be propagated."""
        return self.propagated and self.counted

    def weighted(self, sums: Tensor, weight: Tensor, factored: bool = True) -> Tensor:
        """Sums of powers of activations and gradients, in place times the same power of the weight.

        Args:
            factored: whether the sums are without the weight; else they are of relevance already.
        """
        if not factored:
            return sums.mul_(weight.abs()) if self.contributing else sums
        if self.signed:
            return sums.mul_(weight)
        if self.root % 2:
            sums.mul_(weight.abs())
        for _ in range(self.root // 2):
            sums.mul_(weight.square())
        return sums

    def reduced(self, values: Tensor) -> Tensor:
        """Values ``[samples, tokens, ...]`` summed over samples and tokens."""
        if self.by_sample:
            return values.sum(1).abs().sum(0)
        return power_of(values, self.power, values.dtype).sum((0, 1))

    def read(self, sums: Tensor, num_samples: int, shares: Tensor | None = None) -> Tensor:
        """The values of sums over so many samples.

        Args:
            sums: what was summed, in a tensor that is left alone.
            num_samples: how many samples it is of.
            shares: of a weight's contribution in its tensor, over the weight; where these are a factor.
        """
        if self.contributing:
            assert shares is not None
            # (|W|^3 G A^(1/2))^(1/3) = (|W| G^(1/2))^(2/3) (|W| A^(1/2))^(1/3)
            return (sums * (shares / num_samples)).pow_(1 / self.root)
        values = sums / num_samples if num_samples > 1 else sums
        if self.root == 1:
            return values
        return values.sqrt() if self.root == 2 else values.pow(1 / self.root)

    def to_plain(self) -> str | dict[str, str | int | bool]:
        """The name of a statistic that is known by its name, the fields of any other: what is written to files."""
        if self == Statistic.named(self.name):
            return self.name
        return {field: getattr(self, field) for field in self.__dataclass_fields__}


STATISTICS: dict[str, Statistic] = {
    statistic.name: statistic
    for statistic in (
        Statistic("signed"),
        Statistic("abs_sample", by_sample=True),
        Statistic("abs_token", power=1),
        Statistic("pxp", power=1, by_map=True),
        Statistic("squared_token", power=2),
        Statistic("geometric", power=2, contributing=True),
        Statistic("input_norm", power=2, propagated=False),
        Statistic("activation", power=2, propagated=False, weighing=False),
        Statistic("structure", propagated=False, counted=False),
    )
}
"""All statistics with a name of their own. The last one finds units, and sums nothing."""

OF_RELEVANCE: tuple[str, ...] = tuple(name for name, statistic in STATISTICS.items() if statistic.propagated)
"""The names of those that reduce relevance."""


def statistic_of(statistic: str | Statistic) -> Statistic:
    """A statistic by its name, or the statistic itself.

    Raises:
        ValueError: if there is none of that name.
    """
    if isinstance(statistic, Statistic):
        return statistic
    if statistic not in STATISTICS:
        raise ValueError(f"statistic must be one of {OF_RELEVANCE} or a Statistic, got {statistic!r}")
    return STATISTICS[statistic]


def power_of(tensor: Tensor, power: int, dtype: torch.dtype) -> Tensor:
    """``|x| ** power`` in ``dtype``, or ``x`` itself for 0."""
    converted = tensor.to(dtype)
    if power == 0:
        return converted
    if power > 2:
        return converted.abs().pow_(power)
    if converted is tensor:
        return tensor.abs() if power == 1 else tensor.square()
    return converted.abs_() if power == 1 else converted.square_()
