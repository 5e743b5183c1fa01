"""A direction that parts one set of vectors from several others, and where along it to draw the line."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lrp_prune.arguments import check_number
from lrp_prune.effects.limits import checked_limits, limit_of


def discriminant(wanted: Tensor, others: Sequence[Tensor], shrinkage: float = 0.1) -> Tensor:
    """Fisher's linear discriminant of a set against several, each of which counts alike, of unit length.

    Args:
        wanted: ``[vectors, width]``.
        others: the same for each other set; at least one.
        shrinkage: of the covariance towards a multiple of the identity, in (0, 1].

    Returns:
        ``[width]``, float32.

    Raises:
        ValueError: without other sets, for a shrinkage out of range, or if nothing parts them.

    Example:
        >>> discriminant(torch.tensor([[1.0, 0.0], [1.0, 2.0]]), [torch.tensor([[-1.0, 0.0], [-1.0, 2.0]])], 1.0)
        tensor([1., 0.])
    """
    check_number("shrinkage", shrinkage, "(0, 1]")
    if not others:
        raise ValueError("a direction is learned against at least one general set, there is none")
    groups = [wanted.double(), *(other.double() for other in others)]
    means = [group.mean(0) for group in groups]
    covariance = torch.stack(
        [(group - mean).T @ (group - mean) / len(group) for group, mean in zip(groups, means, strict=True)]
    ).mean(0)
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    mixed = (1 - shrinkage) * covariance + shrinkage * covariance.diagonal().mean() * identity
    difference = means[0] - torch.stack(means[1:]).mean(0)
    direction = torch.linalg.lstsq(mixed, difference[:, None]).solution[:, 0]
    size = direction.norm()
    if not bool(size.isfinite()) or not float(size):
        raise ValueError("the undesired set has the same mean as the general ones: no direction parts them")
    unit: Tensor = direction / size
    return unit.float()


def strictest(scores: Mapping[str, Tensor], allowed: Mapping[str, float] | float) -> float:
    """The lowest threshold that at most ``allowed`` of the scores of each set lie above.

    Args:
        scores: ``[places]`` by the name of the set.
        allowed: a share for all, or shares by name or pattern, of which the most exact one counts.

    Raises:
        ValueError: for a share outside of [0, 1), or of what is no set; and if no set has one.

    Example:
        >>> strictest({"text": torch.arange(10.0), "copying": torch.tensor([3.0, 4.0])}, 0.2)
        7.0
    """
    limits = checked_limits(allowed, list(scores))
    found = []
    for name, values in scores.items():
        share = limit_of(name, limits)
        if share is not None:
            check_number(f"allowed of {name!r}", share, "[0, 1)")
            found.append(float(values.sort(descending=True).values[int(share * len(values))]))
    if not found:
        raise ValueError(f"allowed must say how much of one of {', '.join(scores)} is, got {allowed!r}")
    return max(found)
