"""What is known about torch's optimizers: which of them keep zeros, and which of their states are moments."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

KEEPS_ZEROS: frozenset[type[Optimizer]] = frozenset(
    {
        torch.optim.ASGD,
        torch.optim.Adadelta,
        torch.optim.Adafactor,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.SGD,
        torch.optim.SparseAdam,
    }
)
"""Elementwise optimizers whose update of a zero weight with zero gradient and zero moments is exactly zero, for all
their options (weight decay, momentum, maximize, fused, ...) as long as ``eps`` is not 0, nor rounded to it.
Each is tested. Subclasses may do anything and do not count."""

SECOND_MOMENTS: frozenset[str] = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
"""States that are averages or sums of squared gradients."""
COUNTERS: frozenset[str] = frozenset({"step", "eta", "mu", "mu_product"})
"""States that are no moments, but have the shape of a scalar parameter."""


def keeps_zeros(optimizer: Optimizer) -> bool:
    """Whether a zero weight with zero gradient and zero moments stays exactly zero in a step of this optimizer.

    Example:
        >>> weights = [torch.nn.Parameter(torch.ones(2, 2))]
        >>> keeps_zeros(torch.optim.AdamW(weights)), keeps_zeros(torch.optim.AdamW(weights, eps=0.0))
        (True, False)
    """
    return type(optimizer) in KEEPS_ZEROS and all(map(_divides, optimizer.param_groups))


def _divides(group: Mapping[str, Any]) -> bool:
    """Whether what is added to denominators is more than 0, in the precision of the parameters."""
    eps = group.get("eps")
    eps = eps[0] if isinstance(eps, tuple) else eps
    if eps is None:  # none is needed, or it is the precision's own
        return True
    return all(eps >= torch.finfo(parameter.dtype).smallest_normal for parameter in group["params"])
