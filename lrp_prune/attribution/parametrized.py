"""Weights that are computed from parameters before they are used, as far as a model tells without being run.

``torch.nn.utils.parametrize``, the older hooks of ``torch.nn.utils`` (``prune``, ``spectral_norm``, ``weight_norm``) and
adapters. What a module computes in its own forward shows only there.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from lrp_prune.attribution.adapted import adapted_weights
from lrp_prune.distributed.sharding import is_sharded
from lrp_prune.engine.composites import composite_of
from lrp_prune.engine.endings import Endings
from lrp_prune.engine.mode import PropagationMode
from lrp_prune.engine.origins import marked
from lrp_prune.engine.places import Places
from lrp_prune.engine.roots import Roots
from lrp_prune.engine.uses import WeightUses
from lrp_prune.models.states import undisturbed
from lrp_prune.names import class_name, named_parameters
from lrp_prune.relevance.unscored import DIVIDED, RESCALED, computed

_HOOKS = ("WeightNorm", "SpectralNorm")


class Parametrized(NamedTuple):
    """What is known of weights that are not used as they are.

    Args:
        used: canonical name -> computes the values that are used, in the parameter's shape. A zero in the parameter is one there.
        refused: canonical name -> why zeros in the parameter would not do.
    """

    used: dict[str, Callable[[], Tensor]]
    refused: dict[str, str]


class _Made(NamedTuple):
    """A tensor that stands in a module in a parameter's place: how it is made, by what, and from which parameters."""

    make: Callable[[], Tensor]
    by: str
    parameters: list[nn.Parameter]


def parametrized(model: nn.Module) -> Parametrized:
    """Look at what stands in the place of a model's parameters.

    Each of these tensors is computed once, in evaluation mode, and what is computed is followed from the parameters on: scales
    and masks keep their zeros, sums and products of matrices do not (see :mod:`lrp_prune.engine.origins`).

    Example:
        >>> layer = torch.nn.utils.parametrizations.orthogonal(nn.Linear(2, 2))
        >>> list(parametrized(layer).refused)
        ['parametrizations.weight.original']
    """
    used, refused = adapted_weights(model)
    found = list(_made(model))
    if not found:
        return Parametrized(used, refused)
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    with undisturbed(model):
        for entry in found:
            involved = [names[id(parameter)] for parameter in entry.parameters if id(parameter) in names]
            if any(is_sharded(parameter) for parameter in entry.parameters):
                refused.update(dict.fromkeys(involved, DIVIDED))
                continue
            with _following(model):
                value = entry.make()
            origin = marked(value)
            if origin is None or origin.layout is None:
                reason = RESCALED if origin is not None and origin.rescaled else computed([entry.by])
                refused.update(dict.fromkeys(involved, reason))
            else:
                used[origin.name] = _values_of(model, entry, origin.name)
    return Parametrized(used, refused)


def _values_of(model: nn.Module, entry: _Made, name: str) -> Callable[[], Tensor]:
    """Computes what is used, anew each time, since a tensor that is kept would be another copy of the weight."""

    def values() -> Tensor:
        with undisturbed(model), _following(model):
            value = entry.make()
        origin, parameter = marked(value), named_parameters(model)[name].detach()
        assert origin is not None and origin.layout is not None
        if origin.layout == origin.parameter:
            return value.detach()
        result = torch.zeros_like(parameter)
        origin.layout.on(result).copy_(value.detach())
        return result

    return values


@contextmanager
def _following(model: nn.Module) -> Iterator[None]:
    """What is computed here from parameters carries marks of where it came from."""
    composite, parameters, places = composite_of("gradient"), named_parameters(model), Places(model)
    endings = Endings(class_name(model), composite.name)
    mode = PropagationMode(
        composite, parameters, places, Roots(), WeightUses(), endings, tracing=False, tracer=None, audit=None
    )
    with torch.enable_grad(), mode.acting(), mode:
        yield


def _made(model: nn.Module) -> Iterator[_Made]:
    for module in model.modules():
        if parametrize.is_parametrized(module):
            lists: Any = module.parametrizations
            for name, steps in lists.items():
                by = " and ".join(type(step).__name__.lstrip("_") for step in steps)
                yield _Made(_attribute(module, name), by, list(steps.parameters()))
        for hook in (cast("Any", entry) for entry in module._forward_pre_hooks.values()):
            if isinstance(hook, BasePruningMethod):
                name = hook._tensor_name
                yield _Made(_called(hook.apply_mask, module), type(hook).__name__, _own(module, [f"{name}_orig"]))
            elif type(hook).__name__ in _HOOKS and type(hook).__module__.startswith("torch.nn.utils"):
                name, further = hook.name, [False] if type(hook).__name__ == "SpectralNorm" else []
                parameters = _own(module, [f"{name}_{end}" for end in ("orig", "g", "v")])
                yield _Made(_called(hook.compute_weight, module, *further), type(hook).__name__, parameters)


def _attribute(module: nn.Module, name: str) -> Callable[[], Tensor]:
    return lambda: getattr(module, name)


def _called(function: Callable[..., Tensor], *args: object) -> Callable[[], Tensor]:
    return lambda: function(*args)


def _own(module: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    found = (module._parameters.get(name) for name in names)
    return [parameter for parameter in found if parameter is not None]
