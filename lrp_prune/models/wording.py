"""How models and batches are named in messages, and what to do where one does not fit the other."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lrp_prune.models.batches import fields

WAY_OUT = """say what to run and what to explain by a method relevance_target(batch) of the model, or by target=, a function of \
model and batch:
    def relevance_target(self, batch):
        logits = self(batch["x"])  # as the training calls it
        return logits.gather(1, batch["y"][:, None]).sum()"""
"""What to do where a model cannot be called with a batch, or what to explain cannot be told."""


def described(batch: Any) -> str:
    """What a batch holds, in words.

    Example:
        >>> import torch
        >>> described((torch.zeros(2, 3), "text"))
        'a tensor of shape (2, 3), str'
    """
    named = fields(batch)
    if named is not None:
        return f"{type(batch).__name__} with {listed(named)}"
    if isinstance(batch, tuple | list):
        return ", ".join(map(described, batch)) or "nothing"
    return f"a tensor of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__


def listed(names: Iterable[Any], most: int = 8) -> str:
    """Names in a row, the first of many."""
    names = [str(name) for name in names]
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])]) or "nothing"
