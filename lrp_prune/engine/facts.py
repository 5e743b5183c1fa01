"""Facts: what is known of an intermediate tensor, carried by its Python object, and gone with it.

This is the one place that attaches anything to tensors. What a fact means, and when it holds, is told where it is made:
:mod:`origins <lrp_prune.engine.origins>` of weights, :mod:`tags <lrp_prune.engine.tags>` and
:mod:`shadows <lrp_prune.engine.shadows>` of activations, :mod:`blocks <lrp_prune.engine.blocks>` of what layers have
written, and :mod:`endings <lrp_prune.engine.endings>` of what carries no relevance.
"""

from typing import Any, Generic, TypeVar, cast

from torch import Tensor

Known = TypeVar("Known")


class Fact(Generic[Known]):
    """One kind of fact.

    Args:
        name: no other kind has.

    Example:
        >>> import torch
        >>> colour, tensor = Fact[str]("colour"), torch.ones(2)
        >>> colour.note(tensor, "red")
        >>> colour.of(tensor), colour.of(tensor + 1)
        ('red', None)
    """

    def __init__(self, name: str) -> None:
        self._mark = f"_lrp_prune_{name}"

    def of(self, value: Any) -> Known | None:
        """What is known of a tensor, if anything is."""
        return cast("Known | None", getattr(value, self._mark, None))

    def note(self, value: Any, known: Known | None) -> None:
        """Let something be known of a tensor, or nothing any more; nothing is known of what is no tensor."""
        if not isinstance(value, Tensor):
            return
        if known is not None:
            setattr(value, self._mark, known)
        elif hasattr(value, self._mark):
            delattr(value, self._mark)
