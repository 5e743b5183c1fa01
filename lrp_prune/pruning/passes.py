"""Runs of a model that recalibration compares: its outputs with other products and statistics, and how far apart they are."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrp_prune.engine.composites import composite_of
from lrp_prune.engine.propagation import propagating
from lrp_prune.engine.uses import WeightUses
from lrp_prune.models.calling import call_of
from lrp_prune.models.outputs import logits_by
from lrp_prune.models.profile import profile_of
from lrp_prune.models.returned import tensors_within
from lrp_prune.models.states import unchanged_configuration, undisturbed
from lrp_prune.names import named_modules
from lrp_prune.pruning.choices import Choices
from lrp_prune.pruning.pairs import PlacedUses

BatchNormalization = nn.modules.batchnorm._NormBase

Change = tuple[Tensor, Tensor]
"""A difference of means, and a quotient of variances."""

_CHOICES = frozenset({"next_token", "token", "last_token", "class", "span"})
"""Targets of models that choose: their outputs are compared as distributions."""


def outputs_of(module: nn.Module, batch: Any, uses: WeightUses, target: Any, choices: Choices) -> list[Tensor]:
    """What the model says of a batch: its logits if they are known, else all that it returns of floats, or a target's value."""
    with (
        torch.inference_mode(False),
        undisturbed(module),
        unchanged_configuration(profile_of(module).config),
    ):
        plain = composite_of("gradient")
        with propagating(module, plain, None, "ignore", uses, named=False, backward=False) as propagation, choices:
            if callable(target):
                logits, output = None, target(module, batch)  # of a method that explains nothing it may be anything
            else:
                logits, output = logits_by(module, call_of(module, batch))
            if isinstance(uses, PlacedUses):
                found = ((root.parameter, root.ids) for root in propagation.roots())
                uses.looked_up.update(name for name, ids in found if name is not None and ids is not None)
    if logits is not None:
        return [logits.detach()]
    return tensors_in(output)


def tensors_in(output: Any) -> list[Tensor]:
    """The floats in what a module gives, apart from what is computed from them."""
    return [tensor.detach() for tensor in tensors_within(output) if tensor.is_floating_point()]


@contextmanager
def normalizing(module: nn.Module, told: Callable[[str, Tensor], Change | None]) -> Iterator[None]:
    """Show the inputs of batch normalizations, and let them use other statistics where these are given back."""

    def hook(name: str) -> Any:
        def after(norm: Any, args: Any, output: Tensor) -> Tensor | None:
            change = told(name, args[0])
            if change is None:
                return None
            mean, var = (norm.running_mean + change[0].to(args[0]), norm.running_var * change[1].to(args[0]))
            return F.batch_norm(args[0], mean, var, norm.weight, norm.bias, False, 0.0, norm.eps)

        return after

    handles = [
        entry.register_forward_hook(hook(name), prepend=True)  # before its weights are divided again
        for name, entry in named_modules(module).items()
        if isinstance(entry, BatchNormalization) and entry.running_mean is not None and not _of_instances(entry)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_instances(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.instancenorm._InstanceNorm)


def distances(
    expected: Sequence[Tensor], found: Sequence[Tensor], target: Any, counted: Tensor | None
) -> list[float | None]:
    """How far each output is from the dense model's: in nats where it is a choice, else as a share of the variance.

    None stands for an output that cannot be compared: one of another shape, where shapes depend on values (boxes that were
    found, say); and all of them if there are more or fewer, since nobody knows which is which.
    """
    if len(expected) != len(found):
        return [None] * len(expected)
    distances: list[float | None] = []
    for dense, pruned in zip(expected, found, strict=True):
        if dense.shape != pruned.shape or not dense.numel():
            distances.append(None)
            continue
        dense, pruned = dense.float(), pruned.float()
        if counted is not None and dense.dim() == 2 and len(dense) == counted.numel() != len(counted):
            dense, pruned = dense[counted.flatten()], pruned[counted.flatten()]
        elif counted is not None and dense.shape[:2] == counted.shape:
            dense, pruned = dense[counted], pruned[counted]
        if _is_choice(target) and len(expected) == 1 and dense.dim() > 1 and dense.shape[-1] > 1:
            along = 1 if dense.dim() > 3 else -1
            distances.append(
                float(F.kl_div(pruned.log_softmax(along), dense.log_softmax(along), reduction="sum", log_target=True))
                / max(dense.numel() // dense.shape[along], 1)
            )
        else:
            spread = float((dense - dense.mean()).square().mean())
            distances.append(float((pruned - dense).square().mean()) / max(spread, 1e-12))
    return distances


def _is_choice(target: Any) -> bool:
    return not callable(target) and target in _CHOICES
