"""Less from the blocks whose weights have heavier tails in their spectra: those that have learnt more."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lrp_prune.attribution.candidates import candidates
from lrp_prune.models.subject import subject_of
from lrp_prune.pruning.budgets.budget import Budget, groups_by, of_groups, spread_around
from lrp_prune.relevance.unscored import patterns_of
from lrp_prune.selection.scopes import layout_of

_logger = logging.getLogger("lrp_prune")


def heavy_tailed(
    model: nn.Module,
    sparsity: float = 0.5,
    *,
    spread: float = 0.15,
    by: str = "block",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Budget:
    r"""By the tails of spectra (AlphaPruning, arXiv 2410.10912), from the weights alone.

    A block's quality is the mean of its matrices' exponents :func:`tail_exponent`; what goes grows linearly with it, within
    ``spread`` of a common middle: the heavier the tail (the smaller the exponent), the more is kept. A matrix of one output or
    one input has no tail and does not count; a block of such ones is taken for the mean of the others, which the log says.

    Args:
        model: as for :func:`lrp_prune.prune`.
        sparsity: of all.
        spread: half of the distance between the least and the most pruned block.
        by: ``"block"`` (a module that repeats; a layer where none does), or ``"tensor"``.
        include, exclude: which weights, see :func:`lrp_prune.attribute`.

    Raises:
        ValueError: for an argument out of range, a divided model, or a weight that is not finite.

    Example:
        >>> import torch
        >>> from lrp_prune.pruning import budgets
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> round(budgets.heavy_tailed(model, 0.7).sparsity, 6)
        0.7
    """
    module = subject_of(model).module
    weights = candidates(module, include, exclude)
    groups = groups_by(model, list(weights), by)
    convolutions = {id(part.weight) for part in module.modules() if isinstance(part, nn.modules.conv._ConvNd)}
    layouts = {name: "convolution" if id(entry) in convolutions else None for name, entry in weights.items()}
    without = [name for name, entry in weights.items() if not _has_tail(entry, layouts[name])]
    known = [
        [_exponent_of(name, weights[name], layouts[name]) for name in group if name not in without] for group in groups
    ]
    means = [sum(group) / len(group) for group in known if group]
    if not means:
        raise ValueError("no weight has a spectrum with a tail, as none has two outputs and two inputs")
    if without:
        _logger.info(
            "%s: no spectrum with a tail, taken as what the others are in the mean", ", ".join(patterns_of(without))
        )
    exponents = [sum(group) / len(group) if group else sum(means) / len(means) for group in known]
    sizes = {name: weight.numel() for name, weight in weights.items()}
    entries = [sum(sizes[name] for name in group) for group in groups]
    shares = spread_around(exponents, entries, sparsity, spread)
    return of_groups(groups, shares, sizes, sparsity)


def _exponent_of(name: str, weight: Tensor, layout: str | None) -> float:
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device, where there are no values: load the model first")
    try:
        return tail_exponent(weight, layout)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; leave it out by exclude=[{name!r}]") from error


@torch.no_grad()
def tail_exponent(weight: Tensor, layout: str | None = None) -> float:
    r"""Hill's estimate of the exponent of the tail of a weight's spectrum.

    :math:`\alpha = 1 + k / \sum_{i=1}^{k} \ln(\lambda_{n-i+1} / \lambda_{n-k})` of the eigenvalues :math:`\lambda_1 \leq \dots
    \leq \lambda_n` of :math:`W W^\top`, with :math:`k = \lfloor n / 2 \rfloor`. Of stacked matrices (experts) the mean; a
    convolution is laid out as ``[out, in * kernel]``, as its inputs are.

    Args:
        weight: ``[out, in]``, ``[out, in, *kernel]``, or ``[stack, out, in]``.
        layout: ``"convolution"`` of one with three dimensions; None: what they say, of three that matrices are stacked.

    Raises:
        ValueError: if it has no two eigenvalues, or is not finite.

    Example:
        >>> round(tail_exponent(torch.diag(torch.tensor([1.0, 1.0, 10.0, 10.0]))), 4)  # 1 + 2 / (2 ln 100)
        1.2171
    """
    if not _has_tail(weight, layout):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has no spectrum with a tail")
    if not bool(weight.isfinite().all()):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has values that are not finite")
    found = []
    for matrix in _matrices(weight, layout):
        values = torch.linalg.svdvals(matrix.detach().float()).square()  # the largest first
        number = len(values) // 2
        # Of a weight that has lost its rank the logarithms are of what float32 can tell from zero.
        values = values.clamp(min=float(values[0]) * torch.finfo(torch.float32).eps ** 2)
        tail = float((values[:number].log() - values[number].log()).sum())
        found.append(1 + number / tail if tail > 0 else float("inf"))
    finite = [exponent for exponent in found if exponent != float("inf")]
    if not finite:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has no tail: all that is in its spectrum is equal")
    return sum(finite) / len(finite)


def _matrices(weight: Tensor, layout: str | None) -> list[Tensor]:
    stacked = (layout or layout_of(tuple(weight.shape))).startswith("stacked")
    return list(weight) if stacked else [weight.flatten(1)]


def _has_tail(weight: Tensor, layout: str | None = None) -> bool:
    return weight.dim() > 1 and min(_matrices(weight, layout)[0].shape) > 1
