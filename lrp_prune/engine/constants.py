"""Constants that enter as data: tables of positions, and whatever else a model adds to or joins with its activations.

Where rules conserve, that includes numbers (``up + 1``, ``1 - gate``) and constants with one dimension, which otherwise would
absorb relevance without a trace, and what a function makes of zero (half of a gate that is not told anything).
"""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lrp_prune.engine.endings import ending_of
from lrp_prune.names import canonical_name
from lrp_prune.without_data import has_data

HUGE = 1e4
"""From here on, below zero, an entry among zeros masks something; so large a number does."""


class Constants:
    """Tells which constants are data, and what they are called.

    Args:
        model: whose buffers they may be.
        absorbing: whether numbers and constants with one dimension are roots as well.
    """

    def __init__(self, model: nn.Module, absorbing: bool = False) -> None:
        self._model, self.absorbing = model, absorbing
        self._masks: dict[Any, tuple[Tensor, bool]] = {}
        # Not on the tensors, which may be the model's own; and none is kept alive.
        self._makers: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()

    def returned(self, output: Any, module: str) -> None:
        """Remember which module returned a constant: the first that does has made it."""
        for value in output if isinstance(output, tuple | list) else (output,):
            if isinstance(value, Tensor) and not value.requires_grad and value.is_floating_point():
                self._makers.setdefault(value, module)

    def data(self, value: Tensor, module: str, extent: int) -> str | None:
        """The constant's name, if it is data; else None.

        Args:
            value: what an activation meets.
            module: the module that runs.
            extent: along how many dimensions it must have several entries, unless all that absorbs is wanted. A mask is no
                data, nor is nothing but zeros.
        """
        small = value.dim() == 0 or sum(size > 1 for size in value.shape) < extent
        if (small and not self.absorbing) or self._is_mask(value):
            return None
        return self.name_of(value, module)

    def name_of(self, value: Tensor, module: str) -> str:
        """The buffer that it is a part of, or the module that returned it, or else uses it."""
        storage = value.untyped_storage()._cdata
        for name, buffer in self._model.named_buffers():
            if buffer.untyped_storage()._cdata == storage:
                return canonical_name(name)
        ending = ending_of(value)
        made_by = self._makers.get(value, module) if ending is None else ending.module
        return f"{made_by or 'model'}.{'constant' if ending is None else 'detached'}"

    def forget(self) -> None:
        """Let go of the tensors that were looked at."""
        self._masks.clear()
        self._makers.clear()

    def _is_mask(self, value: Tensor) -> bool:
        """Whether there is nothing but zeros and what forbids something; looked up once where layers share a mask."""
        if value.is_inference():  # which has no version to tell whether it was changed
            return _masks(value)
        key = (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride(), value._version)
        if key not in self._masks:
            self._masks[key] = value, _masks(value)
        return self._masks[key][1]


def _masks(value: Tensor) -> bool:
    if not has_data(value):
        return True  # nothing is kept for either
    lowest = torch.finfo(value.dtype).min / 2
    forbidden = value <= max(-HUGE, lowest)
    never = ~torch.isfinite(value) | (value <= max(lowest, -1e30))
    return bool(never.any() | (forbidden | (value == 0)).all())
