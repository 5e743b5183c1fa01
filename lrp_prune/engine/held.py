"""What rules hold constant in a forward, such as the decays of a scan, and which outputs of layers it was made of.

No relevance goes to a constant. Of a layer that makes other things as well some outputs have none then, which would look like
outputs that are irrelevant.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Backward = Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor | None]]
"""Gives gradients of a scalar, and keeps the graph."""


class Switch:
    """Whether observers see what comes back to weights: apart from what was noted, which the graph must not hold."""

    def __init__(self) -> None:
        self.muted = False


class Held:
    """Notes what is held constant in one forward, and what layers wrote."""

    def __init__(self) -> None:
        self.switch, self.noting = Switch(), True
        self._values: list[Tensor] = []
        self._outputs: list[tuple[Any, Tensor]] = []

    def note(self, value: Tensor) -> None:
        """A rule holds the value constant."""
        self._values.append(value)

    def wrote(self, use: Any, output: Tensor) -> None:
        """A layer has written, by this use of its weight."""
        self._outputs.append((use, output))

    def made_by(self, backward: Backward) -> list[tuple[Any, Tensor]]:
        """The uses of weights that constants were made by, each with the gradient of its output; everything is forgotten."""
        values, outputs = self._values, self._outputs
        self._values, self._outputs, self.noting = [], [], False  # layers that are computed again note nothing
        if not values or not outputs:
            return []
        self.switch.muted = True
        try:
            total = torch.stack([value.double().sum() for value in values]).sum()
            gradients = backward(total, [output for _, output in outputs])
        finally:
            self.switch.muted = False
        found = zip(outputs, gradients, strict=True)
        return [(use, gradient) for (use, _), gradient in found if gradient is not None and bool(gradient.any())]
