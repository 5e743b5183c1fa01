"""Ways to make up for what is pruned in a layer, as objects; a name stands for each with its defaults."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lrp_prune.pruning.compensation.solving import least_squares, optimal_brain_surgeon


class Compensation(ABC):
    r"""How kept weights are updated: :math:`\min_W \lVert W X' - T \rVert^2 + \delta \lVert W - W_0 \rVert^2` under the mask.

    The inputs :math:`X'` are those that the layer gets behind the layers before it, as these are pruned and compensated. The
    targets :math:`T` are what its dense weights :math:`W_0` make of these inputs and of the dense model's :math:`X`, mixed.

    Args:
        dense: share of the dense model's inputs in the targets, in [0, 1]. 0: the layer does to its inputs what it did to them
            before; 1: it gives what the dense model's layer gives, and makes up for the layers before as well.
        damping: :math:`\delta`, as a fraction of the mean of :math:`X'^2` over inputs: what reference samples do not tell stays
            as it is. None: 0.01; of fewer than ten rows (samples, tokens or places) for each of a layer's inputs, what makes one
            half of them good for the other, from 0.01 to 3 (two-fold cross-validation, on some of the layer's outputs).
        weights: ``"relevance"``: tokens (of what has none, samples) count by the root of the absolute relevance of what the block
            gives there, from one backward pass over each batch. None: all alike, which was as good or better.

    Raises:
        ValueError: a share outside [0, 1], or a damping that is not positive.
    """

    dense: float
    damping: float | None
    weights: Literal["relevance"] | None

    def check(self) -> None:
        """Raise what is said above, as soon as it is made."""
        if not 0 <= self.dense <= 1:
            raise ValueError(
                f"dense is the share of the dense model's inputs in the targets, in [0, 1], got {self.dense!r}"
            )
        if self.damping is not None and not self.damping > 0:
            raise ValueError(
                f"damping must be positive (0.01 is usual), or None for what the samples allow, got {self.damping!r}"
            )
        if self.weights not in (None, "relevance"):
            raise ValueError(f"weights must be 'relevance' or None, got {self.weights!r}")

    @abstractmethod
    def solve(self, gram: Tensor, cross: Tensor, kept: Tensor, weight: Tensor) -> Tensor:
        """The weights ``[out, in]`` of one layer, or of some of its rows, zero where nothing is kept.

        Args:
            gram: damped, ``[in, in]``, positive definite; the last input is a one where there is a bias.
            cross: damped, ``[out, in]``.
            kept: boolean ``[out, in]``.
            weight: as they are in the dense model, ``[out, in]``.
        """


@dataclass(frozen=True, kw_only=True)
class LeastSquares(Compensation):
    """``"exact"``: the least squares of all kept weights of a layer together, see :func:`~...solving.least_squares`.

    Args:
        dense: see :class:`Compensation`.
        damping: see :class:`Compensation`.
        weights: see :class:`Compensation`.
        steps: at most so many conjugate gradient steps a layer.
        tolerance: what is left of each row's gradient when it is done.

    Example:
        >>> import torch, lrp_prune
        >>> from lrp_prune.pruning import LeastSquares
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> batches = [(torch.randn(64, 16), torch.randint(4, (64,)))]
        >>> lrp_prune.prune(model, batches, 0.5, compensation=LeastSquares(dense=1.0)).sparsity
        0.5
    """

    dense: float = 0.5
    damping: float | None = None
    weights: Literal["relevance"] | None = None
    steps: int = 100
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        self.check()
        if self.steps < 1 or not self.tolerance > 0:
            raise ValueError(f"steps and tolerance must be positive, got {self.steps!r} and {self.tolerance!r}")

    def solve(self, gram: Tensor, cross: Tensor, kept: Tensor, weight: Tensor) -> Tensor:
        return least_squares(gram, cross, kept, weight, self.steps, self.tolerance)


@dataclass(frozen=True, kw_only=True)
class OptimalBrainSurgeon(Compensation):
    """``"obs"``: column by column, as SparseGPT updates; faster on wide layers and not as close.

    Args:
        dense: see :class:`Compensation`.
        damping: see :class:`Compensation`.
        weights: see :class:`Compensation`.

    Example:
        >>> from lrp_prune.pruning import OptimalBrainSurgeon
        >>> OptimalBrainSurgeon(damping=0.1).dense
        0.5
    """

    dense: float = 0.5
    damping: float | None = None
    weights: Literal["relevance"] | None = None

    def __post_init__(self) -> None:
        self.check()

    def solve(self, gram: Tensor, cross: Tensor, kept: Tensor, weight: Tensor) -> Tensor:
        unmasked = weight if self.dense == 0 else torch.cholesky_solve(cross.T, torch.linalg.cholesky(gram)).T
        return optimal_brain_surgeon(gram, unmasked, kept)


WAYS: dict[str, type[LeastSquares | OptimalBrainSurgeon]] = {"exact": LeastSquares, "obs": OptimalBrainSurgeon}


def compensation_of(given: "str | Compensation | None") -> Compensation | None:
    """The object that a name stands for.

    Raises:
        ValueError: if it is none.

    Example:
        >>> compensation_of("exact").dense
        0.5
    """
    if given is None or isinstance(given, Compensation):
        return given
    way = WAYS.get(given) if isinstance(given, str) else None
    if way is not None:
        return way()
    raise ValueError(
        f"compensation must be one of {sorted(WAYS)}, an object such as lrp_prune.pruning.LeastSquares(), or None, got {given!r}"
    )
