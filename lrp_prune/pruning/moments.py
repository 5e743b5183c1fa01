"""Moments of pairs of outputs, channel by channel, summed over batches and processes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class PairedMoments:
    """Means, squares and products of what a layer gives when pruned, ``p``, and dense, ``t``: float64, one for each channel.

    Centred sums are merged batch by batch (Chan et al. 1979), so that a mean that is large beside the deviations costs no
    precision.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._means, self._sums = (
            torch.zeros(2, channels, dtype=torch.float64, device="cpu"),
            torch.zeros(3, channels, dtype=torch.float64, device="cpu"),
        )

    def add(self, pruned: Tensor, dense: Tensor) -> None:
        """Add outputs ``[places, channels]``."""
        count = len(pruned)
        if count == 0:
            return
        wide = torch.promote_types(pruned.dtype, torch.float32)
        pruned, dense = pruned.to(wide), dense.to(wide)
        means = torch.stack([pruned.mean(0), dense.mean(0)])
        pruned, dense = pruned - means[0], dense - means[1]
        sums = torch.stack([pruned.square().sum(0), dense.square().sum(0), (pruned * dense).sum(0)])
        self._merge(count, means.double().cpu(), sums.double().cpu())

    def _merge(self, count: int, means: Tensor, sums: Tensor) -> None:
        total = self.count + count
        apart, weight = means - self._means, self.count * count / total
        self._sums = self._sums + sums + weight * torch.stack([apart[0] ** 2, apart[1] ** 2, apart[0] * apart[1]])
        self._means = self._means + apart * (count / total)
        self.count = total

    @property
    def told(self) -> bool:
        """Whether there are enough pairs: two numbers are soon fitted to a few, and what comes of it is good for these alone."""
        return self.count >= _FEWEST

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return self._means.shape[1]

    def merge(self, others: Sequence["PairedMoments"]) -> None:
        """Add what others have."""
        for other in others:
            if other.count:
                self._merge(other.count, other._means, other._sums)

    def over(self, summed: Callable[[Tensor], Tensor]) -> "PairedMoments":
        """Those of all processes together, in two sums of so many numbers as there are here, wherever the means are.

        Args:
            summed: gives the sum of a tensor over all processes.
        """
        whole = PairedMoments(self.channels)
        weighed = summed(torch.cat([torch.full_like(self._means[:1], self.count), self.count * self._means]))
        whole.count = int(weighed[0, 0]) if self.channels else 0
        whole._means = weighed[1:] / max(whole.count, 1)
        apart = self._means - whole._means
        products = torch.stack([apart[0] ** 2, apart[1] ** 2, apart[0] * apart[1]])
        whole._sums = summed(self._sums + self.count * products)
        return whole

    def fit(self, strength: float, shifted: bool | Tensor) -> tuple[Tensor, Tensor]:
        r"""Scale and shift of each channel that bring the pruned output closest to the dense one, in the least squares.

        .. math::
            f = \frac{\mathrm{cov}(p, t)}{\mathrm{var}(p)}, \qquad c = \bar t - f \bar p

        or, without a shift, :math:`f = \sum p t / \sum p^2`. A channel that is constant keeps its scale.

        Args:
            strength: how much of the way is gone: the scale is :math:`1 + s (f - 1)`, and the shift :math:`s c`.
            shifted: whether there is a shift; of each channel, or of all.
        """
        mean_p, mean_t = self._means
        squares, _, products = self._sums
        shifted = torch.as_tensor(shifted, device=squares.device)
        squares = torch.where(shifted, squares, squares + self.count * mean_p**2)
        products = torch.where(shifted, products, products + self.count * mean_p * mean_t)
        known = squares > 1e-12 * self.count
        scale = torch.where(known, products / squares.clamp(min=1e-300), 1.0).clamp(_SMALLEST, _LARGEST)
        scale = 1 + strength * (scale - 1)
        shift = torch.where(shifted, strength * (mean_t - scale * mean_p), 0.0)
        return scale, shift

    def change(self) -> tuple[Tensor, Tensor]:
        """By how much mean and variance of the pruned output differ from the dense one's: a difference, and a quotient."""
        pruned, dense, _ = self._sums
        same = dense <= 1e-12 * self.count
        return self._means[0] - self._means[1], torch.where(same, 1.0, pruned / dense.clamp(min=1e-300)).clamp(
            min=1 / _LARGEST**2
        )


_FEWEST = 16
_SMALLEST, _LARGEST = 0.05, 5.0
"""Scales below would prune channels that the masks keep; those beyond come from channels of which next to nothing is left, and
would blow up what is: noise."""
