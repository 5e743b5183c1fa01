"""How much a figure depends on which samples there were: bootstrap intervals of paired sums."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 2000


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
    samples = len(pairs[0][0])
    picked = torch.randint(samples, (draws, samples), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    whole = [totals.double().sum() / counts.double().sum() for totals, counts in pairs]
    drawn = [totals.double()[picked].sum(1) / counts.double()[picked].sum(1) for totals, counts in pairs]
    value, found = float(function(*whole)), function(*drawn)
    found = found[~found.isnan()]
    if math.isnan(value) or not len(found):
        return Interval(value, math.nan, math.nan)
    ordered = found.sort().values
    low, high = (float(ordered[round(share * (len(ordered) - 1))]) for share in (0.025, 0.975))
    return Interval(value, low, high)
