"""Methods that need no data: they look at the weights alone, or not even at these."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrp_prune.pruning.methods.base import Method, Scorable


@dataclass(frozen=True)
class Magnitude(Method):
    """:math:`|W|` of the weights as they are used; of units the root mean square of all weights that they own.

    Args:
        target: of units, a function of model and batch that runs the model, so that they show; None: as it is run to explain it.
    """

    target: Any = None
    name: ClassVar[str] = "magnitude"
    scope: ClassVar[str] = "layer"

    def score(self, scorable: Scorable) -> Tensor:
        """The absolute value."""
        return scorable.weight.abs()


@dataclass(frozen=True)
class Random(Method):
    """Uniform random numbers that depend on the seed and the name only: what a method has to be better than.

    Args:
        seed: another one gives other numbers.
        target: see :class:`Magnitude`.

    Raises:
        ValueError: if the seed is no integer of at least 0.
    """

    seed: int = 0
    target: Any = None
    name: ClassVar[str] = "random"
    scope: ClassVar[str] = "layer"

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed!r}")

    def score(self, scorable: Scorable) -> Tensor:
        """Numbers of the whole tensor, of which each process takes its own."""
        return scorable.part(random_values(scorable.name, scorable.shape, self.seed))


def random_values(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Uniform in [0, 1), by seed and name only."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(ord(c) * (i + 1) for i, c in enumerate(name)))
    return torch.rand(tuple(shape), generator=generator, device="cpu")
