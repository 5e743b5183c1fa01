"""What all metrics here are: a mean over everything that was added, on all processes."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Mean(Metric):
    """A sum and how many there were of it; the base of the metrics.

    ``torchmetrics.MeanMetric`` has the same two states in float32: beyond 16.7 million tokens its count no longer grows by one,
    and its sum forgets small terms. It also leaves out what is no number, where a metric here is not a number either.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def add(self, total: Tensor, count: int | Tensor) -> None:
        """Add a sum of so many."""
        self.total += total.to(device=self.total.device, dtype=torch.float64)
        self.count += count

    def compute(self) -> Tensor:
        """The mean; NaN without anything that counts."""
        return (self.total / self.count).float()
