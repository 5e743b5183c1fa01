"""What a graph saves: nothing of activations where nothing goes back through it, and all of it where something does within."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def without_activations() -> Iterator[None]:
    """While it lasts, a graph keeps indices, by which rows are followed, and no activations.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> with without_activations():
        ...     y = x.exp()
        >>> y.sum().backward()
        Traceback (most recent call last):
        RuntimeError: nothing was kept for a backward pass
    """
    with saved_tensors_hooks(_indices, _as_saved):
        yield


@contextmanager
def with_all() -> Iterator[None]:
    """A graph of its own within a forward: no business of a checkpoint around that, and whole where nothing else is kept."""
    with saved_tensors_hooks(_as_saved, _as_saved):
        yield


def _indices(saved: Tensor) -> Tensor | None:
    return None if saved.is_floating_point() or saved.is_complex() else saved


def _as_saved(saved: Tensor | None) -> Tensor:
    if saved is None:
        raise RuntimeError("nothing was kept for a backward pass")
    return saved
