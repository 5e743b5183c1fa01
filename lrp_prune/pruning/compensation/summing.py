"""Sums of products of rows, as machines make them fastest: half of what is symmetric, of columns that lie well in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNED = 16
"""Columns come in multiples of so many; of an odd width, as a one beside inputs makes it, products take up to twice as long."""
_COLUMNS, _BLOCKS = 128, 8
"""Columns of a block at least, and how many blocks there are at most, of a symmetric matrix of which half is computed."""


def with_ones(rows: Tensor, root: Tensor | float = 1.0) -> Tensor:
    """Rows ``[groups, rows, in]`` in float32 or better with a one beside each and zeros to an even width, times ``root``."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    width = rows.shape[2] + 1
    padded = F.pad(rows, (0, -(-width // _ALIGNED) * _ALIGNED - rows.shape[2]))
    padded[:, :, width - 1] = 1.0
    return padded.mul_(root) if isinstance(root, Tensor) else padded


def with_products(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``total + left^T right`` for each group, in the memory of the total."""
    with torch.autocast(left.device.type, enabled=False):  # the model's, not that of sums
        if total is None:
            return left.transpose(1, 2) @ right
        return total.baddbmm_(left.transpose(1, 2), right)


def with_upper_products(total: Tensor | None, rows: Tensor) -> Tensor:
    """``total + rows^T rows`` at and above the diagonal, and what may be there below: about half of the arithmetic.

    See :func:`mirrored_` for the rest.
    """
    width = rows.shape[2]
    blocks = min(max(width // _COLUMNS, 1), _BLOCKS)
    if total is None:
        total = rows.new_zeros(len(rows), width, width)
    with torch.autocast(rows.device.type, enabled=False):
        for block in range(blocks):
            start, stop = width * block // blocks, width * (block + 1) // blocks
            total[:, start:stop, start:].baddbmm_(rows[:, :, start:stop].transpose(1, 2), rows[:, :, start:])
    return total


def mirrored_(upper: Tensor) -> Tensor:
    """The symmetric matrices whose entries at and above the diagonal are here, in the same memory."""
    above = upper.triu(1).transpose(1, 2)
    return upper.triu_().add_(above)
