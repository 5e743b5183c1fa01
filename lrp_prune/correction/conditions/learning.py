"""A condition that is still to be learned: which module it will look at, and how seldom it is to hold elsewhere."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lrp_prune.arguments import check_number
from lrp_prune.correction.conditions.activation import ActivationAbove


@dataclass(frozen=True)
class Learned:
    """Where a correction is to act: at a module, wherever its output says that the behaviour is under way.

    :func:`lrp_prune.correction.correct` and :class:`~lrp_prune.callbacks.ContrastiveCorrection` learn an
    :class:`ActivationAbove` of it, and take only weights that run later. Until then the hidden states of all labelled tokens are
    held on the CPU (``4 * width`` bytes each; in a Lightning run, those of all processes in each).

    Args:
        at: canonical name of the module that is looked at, ``"model.layers.12"`` say: a layer half way up is a good first try.
        allowed: the largest share of the places of each general set at which it may hold, in [0, 1), or shares by name or
            pattern.
        shrinkage: of the covariance that the direction is found with, in (0, 1].

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> Learned("model.layers.12", allowed={"*": 0.02, "copying": 0.0}).shrinkage
        0.02
    """

    at: str
    allowed: Mapping[str, float] | float = 0.02
    shrinkage: float = 0.02

    def __post_init__(self) -> None:
        check_number("shrinkage", self.shrinkage, "(0, 1]")
        for share in self.allowed.values() if isinstance(self.allowed, Mapping) else [self.allowed]:
            check_number("allowed", share, "[0, 1)")

    def learn(
        self,
        model: nn.Module,
        undesired: Iterable[Mapping[str, Any]],
        general: Mapping[str, Iterable[Mapping[str, Any]]],
    ) -> ActivationAbove:
        """The condition, of what :meth:`ActivationAbove.learned` is given."""
        return ActivationAbove.learned(model, self.at, undesired, general, self.allowed, self.shrinkage)

    def between(self, undesired: Tensor, general: Mapping[str, Tensor]) -> ActivationAbove:
        """The condition, of hidden states that were taken before; see :meth:`ActivationAbove.between`."""
        return ActivationAbove.between(self.at, undesired, general, self.allowed, self.shrinkage)
