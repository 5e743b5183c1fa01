"""Files of relevance: its sums and their description, whole, also of models that are divided among processes."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from lrp_prune.distributed.sharding import Sharding
from lrp_prune.relevance.contributions import INPUTS
from lrp_prune.relevance.members import Member
from lrp_prune.storage import Together, load_tensors, save_tensors

_MEAN_WEIGHTS = "::mean_weights"


def save(path: str | os.PathLike[str], description: Mapping[str, Any], sums: Mapping[str, Tensor]) -> None:
    """Write sums (those of inputs among them) and what :meth:`Relevance.description` gives to a safetensors file; atomic."""
    apart = ("inputs", "mean_weights", "shardings")
    members = {name: [member.to_list() for member in entries] for name, entries in description["members"].items()}
    plain = {**{key: value for key, value in description.items() if key not in apart}, "members": members}
    parts = {**sums, **{name + _MEAN_WEIGHTS: tensor for name, tensor in description["mean_weights"].items()}}
    divided = description["shardings"] if description["granularity"] == "weight" else {}
    keys = {key: key.replace(_MEAN_WEIGHTS, INPUTS) for key in parts}
    whole = {key: _together(part, divided[keys[key]]) if keys[key] in divided else part for key, part in parts.items()}
    save_tensors(path, "relevance", whole, plain)


def _together(part: Tensor, sharding: Sharding) -> Tensor | Together:
    if sharding.mesh is None:
        return part
    return Together(sharding.shape, part.dtype, partial(sharding.gathered, part), sharding.mesh)


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Sums and description of what :func:`save` wrote.

    Raises:
        ValueError: if the file is damaged, of another kind, or of a newer version.
    """
    tensors, description = load_tensors(path, "relevance")
    parts: dict[str, dict[str, Tensor]] = {"": {}, INPUTS: {}, _MEAN_WEIGHTS: {}}
    for key, tensor in tensors.items():
        kind = next((suffix for suffix in (INPUTS, _MEAN_WEIGHTS) if key.endswith(suffix)), "")
        parts[kind][key.removesuffix(kind)] = tensor
    if description["unscored"] and isinstance(description["unscored"], list):
        raise ValueError(
            f"{path} was written by an earlier lrp-prune, which did not say how large unscored weights are: collect the "
            "relevance again"
        )
    members = {name: tuple(map(Member.from_list, entries)) for name, entries in description["members"].items()}
    return parts[""], {**description, "members": members, "inputs": parts[INPUTS], "mean_weights": parts[_MEAN_WEIGHTS]}
