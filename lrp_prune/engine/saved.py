"""What a graph saves: nothing of activations where nothing goes back through it, and all of it where something does within."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_SETS_LEAVES = frozenset({Tensor.requires_grad_, Tensor.requires_grad.__get__, Tensor.requires_grad.__set__})  # type: ignore[attr-defined]  # a descriptor
"""What a forward calls that takes gradients itself: it makes sure first that there will be some."""


class Saving:
    """What the graph of one pass saves of each function that is called: indices, by which rows are followed, or all.

    It is entered for one function at a time, since what `torch.func` transforms in between may have no hooks around it.

    Args:
        everything: whether something goes back through the graph.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> with Saving(everything=False):
        ...     y = x.exp()
        >>> y.sum().backward()
        Traceback (most recent call last):
        RuntimeError: nothing was kept for a backward pass
    """

    def __init__(self, everything: bool = True) -> None:
        self.everything = everything
        self._entered: list[bool] = []

    def called(self, function: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
        """A forward calls a function: from a tensor on that is made to require grad, a gradient may be taken within it."""
        if function in _SETS_LEAVES or kwargs.get("requires_grad"):
            self.everything = True

    def __enter__(self) -> "Saving":
        allowed = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]  # not in torch's stubs
        hooked = not self.everything and allowed()
        self._entered.append(hooked)
        if hooked:
            torch._C._autograd._push_saved_tensors_default_hooks(self._kept, _as_saved)
        return self

    def __exit__(self, *error: object) -> None:
        if self._entered.pop():
            torch._C._autograd._pop_saved_tensors_default_hooks()

    def _kept(self, saved: Tensor) -> Tensor | None:
        return None if saved.is_floating_point() or saved.is_complex() else saved


@contextmanager
def with_all() -> Iterator[None]:
    """A graph of its own within a forward: no business of a checkpoint around that, and whole where nothing else is kept."""
    with saved_tensors_hooks(_as_saved, _as_saved):
        yield


def _as_saved(saved: Tensor | None) -> Tensor:
    if saved is None:
        raise RuntimeError("nothing was kept for a backward pass")
    return saved
