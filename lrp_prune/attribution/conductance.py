r"""Conductance: what flows through an activation while the inputs go from zeros to what they are.

:math:`\int_0^1 \frac{\partial f}{\partial a} \, da(\alpha)` (Dhamdhere et al., arXiv 1805.12233), entry by entry, by the
trapezoidal rule :math:`\sum_k \frac12 (d_k + d_{k-1}) (a_k - a_{k-1})` over passes of one batch with its inputs at
:math:`\alpha_k = k / n`.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class _Way:
    """What a use of a layer had at the last point, and what has flowed by then."""

    activation: Tensor
    gradient: Tensor
    flowed: Tensor


class Conductance:
    """Sums up what flows through the activations that one layer reads, over the points of a path.

    Args:
        name: the layer's, in messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._ways: list[_Way] = []
        self._uses = 0
        self._first = self._last = False

    def begin(self, point: int, points: int) -> None:
        """Go to a point; the same uses come in the same order at each of them."""
        self._first, self._last, self._uses = point == 0, point == points - 1, 0
        if self._first:
            self._ways = []

    def add(self, activation: Tensor, gradient: Tensor) -> Tensor | None:
        """Add a use at the point; at the last point what has flowed on the whole path, in the activation's shape."""
        index, self._uses = self._uses, self._uses + 1
        if self._first:
            self._ways.append(_Way(activation, gradient, activation.new_zeros(activation.shape)))
            return None
        if index >= len(self._ways) or self._ways[index].activation.shape != activation.shape:
            raise self._turned()
        way = self._ways[index]
        way.flowed += (activation - way.activation) * (gradient + way.gradient) / 2
        way.activation, way.gradient = activation, gradient
        return way.flowed if self._last else None

    def end(self) -> None:
        """A pass at one point is over.

        Raises:
            ValueError: if the layer was used less often than at the first point.
        """
        if self._uses < len(self._ways):
            raise self._turned()

    def _turned(self) -> ValueError:
        return ValueError(
            f"what {self._name} reads is not the same at each step from zeros to the inputs (as of an expert, whose router picks "
            "other tokens then), and cannot be integrated: use method 'lrp' or 'gradient'"
        )
