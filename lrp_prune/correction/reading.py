"""Patches from files and states, under a condition or not."""

import os
from collections.abc import Mapping
from typing import Any

from lrp_prune.correction.conditional import KIND, ConditionalPatch
from lrp_prune.correction.patch import Patch
from lrp_prune.storage import kind_of


def load_patch(path: str | os.PathLike[str]) -> Patch:
    """Read what :meth:`Patch.save` or :meth:`ConditionalPatch.save` wrote; nothing in the file is executed.

    Raises:
        ValueError: if the file is damaged, of another kind, of a newer version, or of a condition whose class is not defined.
    """
    return ConditionalPatch.load(path) if kind_of(path) == KIND else Patch.load(path)


def patch_of(state: Mapping[str, Any]) -> Patch:
    """A patch from what its ``state_dict`` gave.

    Raises:
        ValueError: if the class of its condition is not defined.
    """
    return (ConditionalPatch if "condition" in state["description"] else Patch).from_state_dict(state)
