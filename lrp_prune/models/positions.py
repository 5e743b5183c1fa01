"""Position ids of left-padded batches, which count attended tokens only."""

import sys
from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor, nn

from lrp_prune.models.profile import Profile
from lrp_prune.without_data import has_data

_OWN_COUNTS = ("create_position_ids_from_input_ids", "get_rope_index", "compute_3d_position_ids")


def counted_positions(profile: Profile, taken: Container[str], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """``position_ids`` as generation makes them, for a decoder and a batch that is padded on the left: padding changes nothing.

    Encoders keep theirs, which are those of their training. So do models that count attended tokens by themselves, some of
    them from another number on.
    """
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or "position_ids" not in taken or "position_ids" in arguments:
        return {}
    if profile.inner is None or not profile.left_to_right or not has_data(mask):
        return {}
    if not bool((mask[:, 0] == 0).any()):
        return {}
    if any(map(_counts_itself, profile.inner.modules())):
        return {}
    return {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}


def _counts_itself(module: nn.Module) -> bool:
    """Whether a module, or the file that it is written in, has a function that makes position ids from tokens."""
    places = (module, sys.modules.get(type(module).__module__))
    return any(hasattr(place, name) for place in places for name in _OWN_COUNTS)
