"""Precision of what rules compute, also of tensors that have shapes alone."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lrp_prune.without_data import has_data


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off: rules choose their precision by themselves.

    Args:
        device: where they compute; torch refuses autocast for ``"meta"``, where there is none to be turned off.
    """
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def is_finite(value: Tensor) -> bool:
    """Whether all entries are finite, as far as there are any."""
    return not has_data(value) or bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())
