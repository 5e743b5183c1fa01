r"""Hard-concrete gates (Louizos et al., arXiv 1712.01312): random in [0, 1], exactly 0 and 1 with positive probability.

With a location :math:`\log\alpha` and uniform noise :math:`u`,

.. math:: s = \sigma((\log u - \log(1 - u) + \log\alpha) / \beta), \quad z = \min(1, \max(0, s (\zeta - \gamma) + \gamma)).

The gate is open (:math:`z > 0`) with probability :math:`\sigma(\log\alpha - \beta \log(-\gamma / \zeta))`, which is what
penalties and densities count. Without noise :math:`z` is computed from :math:`s = \sigma(\log\alpha)`; a binary gate is open iff
that is above one half, which is :math:`\log\alpha > 0`.
"""

import math

import torch
from torch import Tensor

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def sample(log_alpha: Tensor) -> Tensor:
    """One draw of each gate, differentiable in its location.

    Example:
        >>> bool((sample(torch.tensor([20.0, -20.0])) == torch.tensor([1.0, 0.0])).all())
        True
    """
    noise = torch.rand_like(log_alpha).clamp(1e-6, 1 - 1e-6)
    opened = torch.sigmoid((noise.log() - (1 - noise).log() + log_alpha) / BETA)
    return (opened * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def probability_open(log_alpha: Tensor) -> Tensor:
    """The probability that a gate is not 0.

    Example:
        >>> round(float(probability_open(torch.tensor(0.0))), 4)
        0.8318
    """
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def is_open(log_alpha: Tensor) -> Tensor:
    """The binary gate."""
    return log_alpha > 0
