"""Where a patch comes from: plain values that travel with it."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lrp_prune.correction.entries import read
from lrp_prune.distributed.sharding import is_sharded
from lrp_prune.names import class_name, named_parameters, unwrap

if TYPE_CHECKING:
    from lrp_prune.relevance import Relevance

_SAMPLED = 1024


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of all parameters' types, shapes and up to 1,024 evenly spaced entries each, in the model's order.

    It identifies a model in a moment whatever its size, and whatever it is wrapped in; it proves nothing about single
    entries (a patch's checksums do). That of a model sharded by ``fully_shard`` is the same; all processes must ask for it.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> model_fingerprint(layer) == model_fingerprint(torch.nn.Sequential(layer))
        True
    """
    digest = hashlib.sha256()
    for parameter in named_parameters(model).values():
        digest.update(f"{parameter.dtype}{tuple(parameter.shape)}".encode())
        if parameter.device.type == "meta" or parameter.numel() == 0:
            continue
        step = max(parameter.numel() // _SAMPLED, 1)
        if is_sharded(parameter):
            flat = read(parameter, torch.arange(0, parameter.numel(), step, device="cpu"))
        else:
            flat = parameter.detach().reshape(-1)[::step].cpu().contiguous()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_model(model: nn.Module) -> dict[str, Any]:
    """The model's class, size and fingerprint."""
    module = unwrap(model)
    return {
        "model": class_name(module),
        "num_parameters": sum(parameter.numel() for parameter in named_parameters(module).values()),
        "fingerprint": model_fingerprint(module),
        "lrp_prune": _own_version(),
    }


def describe_relevance(relevance: "Relevance") -> dict[str, Any]:
    """How a reference set was explained."""
    return {
        "num_samples": relevance.num_samples,
        "target": relevance.target,
        "statistic": relevance.statistic,
        "composite": relevance.composite,
        "granularity": relevance.granularity,
    }


def describe_references(
    general: "Relevance",
    undesired: "Relevance",
    guard_by: "Relevance | None",
    given: Mapping[str, Any] | None,
    sets: "Mapping[str, Relevance] | None" = None,
) -> dict[str, Any]:
    """How the reference sets of a contrast were explained, what is said about them, and what sets there are."""
    several = {"sets": {name: describe_relevance(each) for name, each in sets.items()}} if sets else {}
    return {
        **dict(given or {}),
        **several,
        "general": describe_relevance(general),
        "undesired": describe_relevance(undesired),
        "guard_by": None if guard_by is None else describe_relevance(guard_by),
    }


def _own_version() -> str:
    try:
        return version("lrp-prune")
    except PackageNotFoundError:
        return "unknown"
