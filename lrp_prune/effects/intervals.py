"""How much a figure depends on which samples there were: bootstrap intervals of paired sums."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 2000
_AT_ONCE = 2**20
"""Samples drawn at once: a set of test images has ten thousand, and 2,000 draws of them are 160 MB for each column."""


class Interval(NamedTuple):
    """A value, and 95 % of the values that samples drawn with replacement give."""

    value: float
    low: float
    high: float


def intervals(
    pairs: Sequence[tuple[Tensor, Tensor]], function: Callable[..., Tensor], seed: int = 0, draws: int = DRAWS
) -> Interval:
    """A function of means over the same samples, and its interval by the percentiles of a bootstrap.

    Args:
        pairs: totals and counts ``[samples]``, as many pairs as the function takes means; a mean is the sum of the totals of the
            drawn samples over that of their counts.
        function: of the means, elementwise.
        seed: of the samples drawn.
        draws: how often.

    Returns:
        The value on all samples, and the interval. NaN where nothing was counted.

    Example:
        >>> ones = torch.ones(4)
        >>> intervals([(torch.tensor([2.0, 2.0, 2.0, 2.0]), ones), (ones, ones)], lambda a, b: a / b)
        Interval(value=2.0, low=2.0, high=2.0)
    """
    samples, generator = len(pairs[0][0]), torch.Generator("cpu").manual_seed(seed)
    columns = [(totals.double(), counts.double()) for totals, counts in pairs]
    rows = max(_AT_ONCE // samples, 1)
    several = []
    for start in range(0, draws, rows):
        size = (min(rows, draws - start), samples)
        picked = torch.randint(samples, size, generator=generator, device="cpu")
        several.append(function(*(totals[picked].sum(1) / counts[picked].sum(1) for totals, counts in columns)))
    value = float(function(*(totals.sum() / counts.sum() for totals, counts in columns)))
    found = torch.cat(several)
    found = found[~found.isnan()]
    if math.isnan(value) or not len(found):
        return Interval(value, math.nan, math.nan)
    ordered = found.sort().values
    low, high = (float(ordered[round(share * (len(ordered) - 1))]) for share in (0.025, 0.975))
    return Interval(value, low, high)
