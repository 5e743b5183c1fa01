"""The k smallest of each row, exactly: for scopes whose comparison sets are small."""

import numpy as np
import torch
from torch import Tensor

from lrp_prune.selection.keys import CHUNK, DEVICE_CHUNK, ORDERS, KeyFormat

# Up to this length a row's entries are compared pair by pair, all rows at once (2:4 sparsity, say).
_PAIRWISE = 16


def smallest_per_row(
    values: Tensor, k: int, *, order: str = "absolute", kept: Tensor | None = None, name: str = "the tensor"
) -> Tensor:
    """Choose exactly the ``k`` smallest entries of each row; equal ones by position.

    Args:
        values: ``[rows, columns]`` of any floating-point type.
        k: entries to choose in each row, with the already pruned ones, which are chosen before all others.
        order: ``"absolute"`` or ``"signed"``.
        kept: bool ``[rows, columns]``, False for already pruned entries.
        name: what an error calls the tensor.

    Returns:
        bool ``[rows, columns]``, False for what is chosen, on the device of ``values``.

    Raises:
        ValueError: if a value is not finite, ``k`` is out of range, or more than ``k`` entries of a row are pruned
        already.

    Example:
        >>> smallest_per_row(torch.tensor([[3.0, -1.0, 2.0], [5.0, 5.0, 5.0]]), 1)
        tensor([[ True, False,  True],
                [False,  True,  True]])
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    if not values.is_floating_point():
        raise ValueError(f"{name} has type {values.dtype}: only floating-point values can be ranked")
    rows, columns = values.shape
    if not 0 <= k <= columns:
        raise ValueError(f"k must be in [0, {columns}], the entries of a row of {name}, got {k}")
    form = KeyFormat(order == "absolute", torch.float64 if values.dtype == torch.float64 else torch.float32)
    result = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    step = max((CHUNK if values.device.type == "cpu" else DEVICE_CHUNK) // max(columns, 1), 1)
    for start in range(0, rows, step):
        keys = form.of(values.detach()[start : start + step])
        if not form.finite(keys):
            raise ValueError(f"{name} has values that are infinite or NaN: nothing was selected")
        if kept is not None:
            pruned = ~kept[start : start + step].to(keys.device)
            most = int(pruned.sum(dim=1).max())
            if most > k:
                raise ValueError(
                    f"a row of {name} has {most} of {columns} entries pruned already, more than the {k} asked for: "
                    "sparsity is total, ask for at least as much, or leave out the existing masks"
                )
            keys.masked_fill_(pruned, form.first)
        result[start : start + step] = _kept(keys, k)
    return result


def _kept(keys: Tensor, k: int) -> Tensor:
    """False for the ``k`` smallest keys of each row of ``[rows, columns]``."""
    rows, columns = keys.shape
    if k == 0 or k == columns:
        return torch.full_like(keys, k == 0, dtype=torch.bool)
    if columns <= _PAIRWISE:
        return _kept_pairwise(keys, k)
    if keys.device.type == "cpu":
        array = keys.numpy()
        threshold = torch.from_numpy(np.partition(array, k - 1, axis=1)[:, k - 1 : k].copy())
        kept = torch.from_numpy(array > threshold.numpy())
        exact = np.count_nonzero(kept.numpy()) == rows * (columns - k)
    else:
        threshold = torch.kthvalue(keys, k, dim=1, keepdim=True).values
        kept = keys > threshold
        exact = int(kept.sum()) == rows * (columns - k)
    if exact:
        return kept
    # No row keeps too many, so some keep too few: there the last of the entries equal to the threshold are kept too.
    short = (kept.sum(dim=1) < columns - k).nonzero().view(-1)
    some, limit = keys[short], threshold[short]
    tied = some == limit
    chosen = k - (some < limit).sum(dim=1, keepdim=True)
    kept[short] |= tied & (tied.cumsum(dim=1, dtype=torch.int32) > chosen)
    return kept


def _kept_pairwise(keys: Tensor, k: int) -> Tensor:
    rows, columns = keys.shape
    # How many entries of its row come before each: at first all later ones, then corrected pair by pair.
    ranks = torch.arange(columns - 1, -1, -1, dtype=torch.uint8, device=keys.device)[:, None].repeat(1, rows)
    columnwise = keys.t().contiguous()
    for later in range(1, columns):
        for earlier in range(later):
            first = _not_above(columnwise[earlier], columnwise[later])
            ranks[later] += first
            ranks[earlier] -= first
    return (ranks >= k).t().contiguous()


def _not_above(left: Tensor, right: Tensor) -> Tensor:
    """1 where an integer is at most the other, else 0, as uint8."""
    if left.device.type == "cpu":
        return torch.from_numpy((left.numpy() <= right.numpy()).view(np.uint8))
    return (left <= right).view(torch.uint8)
