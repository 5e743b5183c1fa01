"""How much of a model can be pruned: the area under a metric by pruning rate, and the highest rate that keeps most of it."""

import bisect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

RATES: tuple[float, ...] = tuple(step / 20 for step in range(20))
"""The rates of Pruning by eXplaining: 0, 5, ..., 95 %."""


def pruning_area(rates: Sequence[float], values: Sequence[float]) -> float:
    r"""The mean of a metric over pruning rates, :math:`A_{PR} = \frac{1}{r_m - r_1} \int_{r_1}^{r_m} f(r) \, dr`, by trapezoids.

    Of Pruning by eXplaining (arXiv 2408.12568), which has 20 rates from 0 to 95 %; in the units of the metric, so that a model
    that loses nothing has the metric's value without pruning.

    Args:
        rates: shares that are pruned, in [0, 1), in any order.
        values: of the metric at each of them.

    Raises:
        ValueError: for less than two different rates, or another number of values.

    Example:
        >>> round(pruning_area([0.0, 0.5, 0.9], [1.0, 0.8, 0.2]), 4)  # (0.5 * 0.9 + 0.4 * 0.5) / 0.9
        0.7222
    """
    points = _points(rates, values)
    if len(points) < 2:
        raise ValueError(f"an area is between two pruning rates or more, got {[rate for rate, _ in points]}")
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    return float(torch.trapezoid(y, x) / (x[-1] - x[0]))


def top_pruning_rate(
    rates: Sequence[float], values: Sequence[float], dense: float, share: float = 0.95, higher_is_better: bool = True
) -> float:
    r"""The highest pruning rate up to which a metric keeps a share of its dense value, between rates by a straight line.

    That is the first place where :math:`f(r) < s f(0)` (for a loss, :math:`f(r) > f(0) / s`): what comes back at higher rates
    does not count. Of Pruning by eXplaining (arXiv 2408.12568), which has :math:`s = 0.95`.

    Args:
        rates: shares that are pruned, in any order.
        values: of the metric at each of them.
        dense: the metric's value without pruning, positive.
        share: what is to be kept of it.
        higher_is_better: False for a loss or a perplexity.

    Raises:
        ValueError: for arguments that do not fit, or a dense value or a share that is not positive.

    Example:
        >>> round(top_pruning_rate([0.2, 0.4, 0.6], [1.0, 0.99, 0.91], dense=1.0), 2)  # half-way from 0.4 to 0.6
        0.5
    """
    if not dense > 0 or not 0 < share <= 1:
        raise ValueError(f"the dense value must be positive and share in (0, 1], got {dense!r} and {share!r}")
    limit = share * dense if higher_is_better else dense / share
    before_rate, before = 0.0, dense
    for rate, value in _points(rates, values):
        if math.isnan(value) or (value < limit if higher_is_better else value > limit):
            step = (limit - before) / (value - before) if math.isfinite(value) and value != before else 0.0
            return before_rate + step * (rate - before_rate)
        before_rate, before = rate, value
    return before_rate


def _points(rates: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    if len(rates) != len(values) or len(set(rates)) < len(rates):
        raise ValueError(f"there must be a value for each of different rates, got {len(values)} for {list(rates)}")
    for rate in rates:
        if not 0 <= rate < 1:
            raise ValueError(f"pruning rates must be in [0, 1), got {rate!r}")
    return sorted(zip(map(float, rates), map(float, values), strict=True))


class PruningArea(Metric):
    """:func:`pruning_area` of a mean that is added up batch by batch, at each rate, on all processes.

    Args:
        rates: the pruning rates, at least two.

    Example:
        >>> area = PruningArea(rates=[0.0, 0.5])
        >>> area.update(torch.tensor([1.0, 1.0]), rate=0.0)  # two right answers of the dense model
        >>> area.update(torch.tensor([1.0, 0.0]), rate=0.5)
        >>> area.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    is_differentiable = False
    full_state_update = False
    totals: Tensor
    counts: Tensor

    def __init__(self, rates: Sequence[float] = RATES, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        pruning_area(rates, [0.0] * len(rates))
        self.rates = sorted(map(float, rates))
        self.add_state("totals", torch.zeros(len(self.rates), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(self.rates), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor, rate: float) -> None:
        """Add the metric's values of some samples of the model that is pruned to a rate.

        Raises:
            ValueError: the rate is none of :attr:`rates`.
        """
        index = bisect.bisect_left(self.rates, float(rate))
        if index == len(self.rates) or self.rates[index] != float(rate):
            raise ValueError(f"rate must be one of {self.rates}, got {rate!r}")
        self.totals[index] += values.to(torch.float64).sum()
        self.counts[index] += values.numel()

    def means(self) -> list[float]:
        """The mean at each rate; NaN where nothing was added."""
        found: list[float] = (self.totals / self.counts).tolist()
        return found

    def compute(self) -> Tensor:
        """The area; NaN if a rate has no samples."""
        return torch.tensor(pruning_area(self.rates, self.means()), dtype=torch.float64)


class TopPruningRate(PruningArea):
    """:func:`top_pruning_rate` of a mean that is added up batch by batch, at each rate, on all processes.

    Args:
        rates: the pruning rates, the first of them 0: what is kept is a share of the value there.
        share: what is to be kept.

    Example:
        >>> top = TopPruningRate(rates=[0.0, 0.5], share=0.9)
        >>> top.update(torch.tensor([1.0, 1.0]), rate=0.0)
        >>> top.update(torch.tensor([1.0, 0.6]), rate=0.5)
        >>> top.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    def __init__(self, rates: Sequence[float] = RATES, share: float = 0.95, **kwargs: Any) -> None:
        super().__init__(rates, **kwargs)
        if self.rates[0] != 0:
            raise ValueError(f"the rates must begin with 0, the dense model, got {self.rates[0]}")
        self.share = share
        top_pruning_rate([0.0], [1.0], 1.0, share)

    def compute(self) -> Tensor:
        """The rate; NaN if a rate has no samples, or the dense model's mean is not positive."""
        means = self.means()
        known = bool(self.counts.all()) and means[0] > 0
        rate = top_pruning_rate(self.rates, means, means[0], self.share) if known else math.nan
        return torch.tensor(rate, dtype=torch.float64)
