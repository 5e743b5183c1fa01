"""Operations that stand for several, written in those, so that each of them gets its rule."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    values, gate = input.chunk(2, dim)
    return values * torch.sigmoid(gate)


def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    lengths = [torch.linalg.vector_norm(x, dim=dim).clamp_min(eps) for x in (x1, x2)]
    similarity: Tensor = (x1 * x2).sum(dim) / (lengths[0] * lengths[1])
    return similarity


def _lerp(input: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    return input * (1 - weight) + end * weight


def _addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + value * (tensor1 / tensor2)


def _log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    wide = input if dtype is None else input.to(dtype)
    return wide - torch.logsumexp(wide, dim, keepdim=True)


PARTS: dict[str, Callable[..., Any]] = {
    "glu": _glu,
    "cosine_similarity": _cosine_similarity,
    "lerp": _lerp,
    "addcdiv": _addcdiv,
    "log_softmax": _log_softmax,
    "special_log_softmax": _log_softmax,
}
"""Function's name -> the same in simpler operations, equal up to rounding."""
