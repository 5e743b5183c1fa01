"""Masks of units for models that are to be shrunk, and the sizes of these."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.models.batches import tensors
from lrp_prune.models.calling import run

CLASSES = torch.zeros(3, dtype=torch.int64)


def masks_of(
    model: nn.Module, batch: Any, granularity: str, sparsity: float = 0.5, scope: str = "layer", **options: Any
) -> lrp_prune.Masks:
    """Masks by magnitude; the model stays as it is."""
    return lrp_prune.prune(
        copy.deepcopy(model),
        [batch],
        sparsity,
        "magnitude",
        scope,
        granularity=granularity,
        recalibrate=False,
        progress=False,
        **options,
    )


def masked(model: nn.Module, masks: lrp_prune.Masks) -> nn.Module:
    pruned = copy.deepcopy(model)
    masks.apply_(pruned)
    return pruned


def value(model: nn.Module, batch: Any) -> Tensor:
    """Something to explain: which units there are does not depend on it."""
    output = run(model, batch)
    return next(each for each in tensors(output) if each.is_floating_point()).sum()


def keeping(model: nn.Module, batch: Any, granularity: str, kept: dict[str, list[int]]) -> lrp_prune.Masks:
    """Masks that leave these units of each layer, by the end of its name, and all of other layers."""
    options: dict[str, Any] = {"statistic": "squared_token", "include": ["*"], "unruled": "ignore"}
    relevance = lrp_prune.attribute(model, [batch], target=value, granularity=granularity, **options)
    values = {name: torch.ones(len(each)) for name, each in relevance.items()}
    for end, units in kept.items():
        (name,) = (name for name in values if name.endswith(end))
        values[name] = torch.zeros(len(values[name])).index_fill(0, torch.tensor(units), 1.0)
    number = sum(int((each == 0).sum()) for each in values.values())
    scores = relevance.with_values(values, "given")
    return lrp_prune.select(scores, number / sum(len(each) for each in values.values()), scope="global")


def sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
