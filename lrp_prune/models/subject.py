"""What of a module is run: itself, or of a ``LightningModule`` the model that it holds."""

from typing import Any, NamedTuple

from torch import nn

from lrp_prune.models.wording import WAY_OUT, listed
from lrp_prune.names import class_name, unwrap


class Subject(NamedTuple):
    """What is explained: the module whose forward runs (names are relative to it), and its own target, if it defines one."""

    module: nn.Module
    own_target: Any


def subject_of(model: nn.Module) -> Subject:
    """Work out what of a module is run.

    A module may define ``relevance_target(batch)``; else what is run is :func:`forwarded`. ``training_step`` and
    ``validation_step`` are never run.

    Raises:
        ValueError: if a LightningModule says nothing about it.
    """
    model = unwrap(model)
    own = getattr(model, "relevance_target", None)
    if not callable(own):
        return Subject(forwarded(model), None)

    def relevance_target(_: nn.Module, batch: Any) -> Any:
        return own(batch)

    return Subject(model, relevance_target)


def forwarded(model: nn.Module) -> nn.Module:
    """The module whose forward takes a batch: of a ``LightningModule`` without a ``forward`` the only model that it holds.

    Metrics, what has no parameters, and a second name of a part of the model are no models of their own.

    Raises:
        ValueError: if there are several, or none.
    """
    model = unwrap(model)
    if not any(base.__name__ == "LightningModule" for base in type(model).__mro__):
        return model
    definer = next(base for base in type(model).__mro__ if "forward" in vars(base))
    if definer.__name__ != "LightningModule" and definer is not nn.Module:
        return model
    children = _models_in(model)
    if len(children) == 1:
        return unwrap(next(iter(children.values())))
    held = f"it holds several models ({listed(children)})" if children else "it holds no model yet"
    raise ValueError(
        f"{class_name(model)} does not say what to run for relevance: it has no forward(), and {held}. Define forward() as the "
        f"training calls it, pass the model itself (module.{next(iter(children), 'model')}), or {WAY_OUT}"
    )


def _models_in(module: nn.Module) -> dict[str, nn.Module]:
    children = {
        name: child
        for name, child in module.named_children()
        if next(child.parameters(), None) is not None and not _is_metric(child)
    }
    parts = {id(part) for child in children.values() for part in child.modules() if part is not child}
    return {name: child for name, child in children.items() if id(child) not in parts}


def _is_metric(module: nn.Module) -> bool:
    return any(
        base.__name__ == "Metric" and base.__module__.startswith("torchmetrics") for base in type(module).__mro__
    )
