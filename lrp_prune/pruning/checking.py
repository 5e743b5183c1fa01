"""What can be known before anything is scored: whether zeros in the weights that are to be pruned would be any use."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lrp_prune.attribution.adapted import adapted_weights
from lrp_prune.attribution.candidates import candidates
from lrp_prune.attribution.collect import RelevanceAccumulator
from lrp_prune.attribution.parametrized import parametrized
from lrp_prune.models.calling import run
from lrp_prune.models.subject import subject_of
from lrp_prune.pruning.coverage import refuse_unusable
from lrp_prune.relevance.unscored import patterns_of


def check_uses(
    model: nn.Module,
    batch: Any = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    trainable_only: bool = False,
) -> dict[str, str]:
    """Weights whose zeros would be none in what the model uses, by name, each with the reason.

    Parametrizations, the older hooks of ``torch.nn.utils`` and adapters show without a batch. What a module computes in its
    forward (weight standardization, a product of two parameters) shows with one: the model is run on it once, and is as before.

    Args:
        model: what is to be pruned.
        batch: one batch as :func:`lrp_prune.attribute` takes it, or None.
        include, exclude, trainable_only: what is to be pruned, as for :func:`lrp_prune.attribute`.

    Raises:
        ValueError: for a pattern that matches nothing, quantized weights, and a batch that the model cannot be run on.

    Example:
        >>> import torch
        >>> class Standardized(nn.Linear):
        ...     def forward(self, x):
        ...         weight = (self.weight - self.weight.mean()) / self.weight.std()
        ...         return nn.functional.linear(x, weight, self.bias)
        >>> list(check_uses(nn.Sequential(Standardized(4, 4), nn.Linear(4, 2)), torch.ones(1, 4)))
        ['0.weight']
    """
    if batch is None:
        module = subject_of(model).module
        refused = parametrized(module).refused
        return {name: refused[name] for name in candidates(module, include, exclude, trainable_only) if name in refused}
    accumulator = RelevanceAccumulator(
        model,
        target=explaining_nothing(model, None),
        composite="gradient",
        statistic="input_norm",
        include=include,
        exclude=exclude,
        trainable_only=trainable_only,
        unruled="ignore",
    )
    accumulator.table.active = set()  # it only looks
    accumulator.update(batch)
    refused, left = accumulator.table.refused, accumulator.table.no_weights()
    return {name: refused[name] for name in accumulator.parameters if name in refused and name not in left}


def check_prunable(model: nn.Module, batch: Any = None, **which: Any) -> None:
    """Refuse what :func:`check_uses` finds, and tell what has to be done with adapters afterwards.

    Raises:
        ValueError: if it finds anything, and what it raises.
    """
    refuse_unusable(check_uses(model, batch, **which))
    module = subject_of(model).module
    adapted = adapted_weights(module)[0]
    beside = [name for name in candidates(module, **which) if name in adapted]
    if beside:
        warnings.warn(
            f"{', '.join(patterns_of(beside))} have adapters, which are added to them also where they are pruned, and by "
            "merge_and_unload() as well: lrp_prune.mask_adapters(model, masks) makes them zero there, for a training of the "
            "adapters; lrp_prune.merge_adapters(model, masks) merges what is left of them",
            UserWarning,
            stacklevel=3,
        )


def explaining_nothing(model: nn.Module, target: Any) -> Callable[[nn.Module, Any], Tensor]:
    """A target for what the forward alone tells: the model is run as it would be explained, nothing is propagated."""
    explained = target if callable(target) else subject_of(model).own_target or run

    def explain_nothing(model: nn.Module, batch: Any) -> Tensor:
        explained(model, batch)
        return torch.zeros((), device="cpu")

    explain_nothing.__qualname__ = "nothing"
    return explain_nothing


def tell_replicas(model: nn.Module) -> None:
    """Warn where processes have a whole model each that is to stay the same in all, and each prunes by what it is given.

    Nothing is asked of the others: it may be that they do something else meanwhile.
    """
    wrapper = next((part for part in model.modules() if isinstance(part, DistributedDataParallel)), None)
    number = 1 if wrapper is None else torch.distributed.get_world_size(wrapper.process_group)
    if number > 1:
        warnings.warn(
            f"each of the {number} processes of DistributedDataParallel prunes its own copy of the model, by the batches that it "
            "is given: unless these are the same everywhere, the copies differ afterwards. In a training "
            "lrp_prune.callbacks.RelevancePruning prunes by the batches of all of them together",
            stacklevel=3,
        )
