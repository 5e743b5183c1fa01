r"""Least squares under a mask: the kept weights of a layer that bring its outputs closest to what they should be.

With inputs :math:`X'` as the layer gets them and targets :math:`T`, each row :math:`w` of the weight has to minimise
:math:`\lVert w X' - t \rVert^2` over its kept entries :math:`S` alone. All that takes is the Gram matrix :math:`G = X' X'^\top`
and the cross products :math:`C = T X'^\top`: the gradient is zero at the kept entries where :math:`(w G)_S = c_S`. Every row has
a system of its own, as it keeps other entries, and all are solved at once.
"""

import torch
from torch import Tensor


def least_squares(
    gram: Tensor, cross: Tensor, kept: Tensor, start: Tensor, steps: int = 100, tolerance: float = 1e-4
) -> Tensor:
    r"""The least squares at the kept entries, by conjugate gradients for all rows at once.

    Each step costs one product with the Gram matrix, scaled to a diagonal of ones, which is the preconditioner (as in ALPS, Meng
    et al. 2024, arXiv 2406.07831). A row is done when its gradient has fallen to ``tolerance`` of what it is at zero; without
    rounding errors that takes at most as many steps as there are entries.

    Args:
        gram: ``[in, in]``, positive definite.
        cross: ``[out, in]``.
        kept: boolean ``[out, in]``.
        start: ``[out, in]``, where the search starts.
        steps: at most so many.
        tolerance: what is left of a row's gradient when it is done.

    Returns:
        ``[out, in]``, zero where nothing is kept.

    Example:
        >>> gram, cross = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[4.0, 5.0]])
        >>> least_squares(gram, cross, torch.tensor([[True, False]]), torch.zeros(1, 2)).tolist()
        [[2.0, 0.0]]
    """
    scale = gram.diagonal().rsqrt()
    gram, cross, at = gram * scale * scale[:, None], cross * scale, kept.to(gram.dtype)
    found = start / scale * at
    left = (cross - found @ gram) * at
    along, size = left.clone(), left.square().sum(1, keepdim=True)
    enough = tolerance**2 * (cross * at).square().sum(1, keepdim=True)
    result, rows = found.clone(), torch.arange(len(found), device=found.device)
    for _ in range(steps):
        working = size > enough
        number = int(working.sum())
        if number == 0:
            break
        if number <= _FEW * len(rows):  # most rows are done long before the last one
            result[rows] = found
            chosen = working.flatten()
            rows, at, found, left, along = rows[chosen], at[chosen], found[chosen], left[chosen], along[chosen]
            size, enough, working = size[chosen], enough[chosen], working[chosen]
        curved = (along @ gram) * at
        step = torch.where(working, size / (along * curved).sum(1, keepdim=True), 0.0)
        found.addcmul_(step, along)
        left.addcmul_(step, curved, value=-1)
        before, size = size, left.square().sum(1, keepdim=True)
        along.mul_(torch.where(working, size / before, 0.0)).add_(left)
    result[rows] = found
    return result * scale


def optimal_brain_surgeon(gram: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    r"""What is kept after each removed entry was made up for by those to its right, column by column.

    With the Cholesky factor :math:`G^{-1} = U^\top U` the entries right of column :math:`j` take over
    :math:`-(w_{ij} / U_{jj}) U_{j,:}` (Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1). Cheaper than the least squares
    under the mask and not as close, since columns on the left can make up for nothing on their right.

    Args:
        gram: ``[in, in]``, positive definite.
        weight: ``[out, in]``, the least squares without a mask.
        kept: boolean ``[out, in]``.

    Returns:
        ``[out, in]``, zero where nothing is kept.
    """
    weight = weight.clone()
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    width = weight.shape[1]
    for start in range(0, width, _COLUMNS):
        end = min(start + _COLUMNS, width)
        columns, corner = weight[:, start:end], factor[start:end, start:end]
        errors = torch.zeros_like(columns)
        for j in range(end - start):
            errors[:, j] = torch.where(kept[:, start + j], 0.0, columns[:, j] / corner[j, j])
            columns[:, j:] -= torch.outer(errors[:, j], corner[j, j:])
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight * kept


_FEW = 0.8
"""With no more than this share of the rows at work, the others are left out of what follows."""
_COLUMNS = 128
"""Columns whose updates of those on their right are made together."""
