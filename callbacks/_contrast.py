"""What a correction is measured by, in all processes alike: metrics of both behaviours, limits, and what a patch does besides."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lrp_prune.callbacks._checks import misconfiguration
from lrp_prune.callbacks._distributed import agreeing, gathered
from lrp_prune.correction import Automatic, Patch, Search, Trial, side_effects_of
from lrp_prune.correction.beside import describe
from lrp_prune.correction.combining import merged
from lrp_prune.correction.guard import Guard, guard_of
from lrp_prune.correction.search import GENERAL
from lrp_prune.correction.verifying import resolve_entries
from lrp_prune.effects import SideEffects, Suite
from lrp_prune.effects.limits import checked_limits
from lrp_prune.models.states import undisturbed, unlogged
from lrp_prune.names import named_parameters
from lrp_prune.relevance import Relevance
from lrp_prune.wrapper.module import CorrectedModule

_GENERAL = "general/"


def measured(trainer: Trainer, name: str, metric: Any, model: nn.Module) -> float:
    """The mean of what a metric gives in all processes, so that all of them decide alike.

    Raises:
        Exception: the metric's own.
        MisconfigurationException: it gives no number.
        OtherProcessError: it failed in another process.
    """
    with agreeing(trainer), unlogged(model):
        found = metric(model)
        try:
            value = float(found)
        except (TypeError, ValueError, RuntimeError) as error:
            raise MisconfigurationException(f"{name}_metric must return a number, got {found!r}") from error
    values: list[float] = gathered(trainer, value)
    return sum(values) / len(values)


def logged(trainer: Trainer, name: str, metric: str) -> float:
    """A metric that the validation has logged.

    Raises:
        MisconfigurationException: it has not.
    """
    found = trainer.callback_metrics.get(metric)
    if found is None:
        raise MisconfigurationException(
            f"{name}_metric {metric!r} was not logged in the validation; there is "
            f"{', '.join(trainer.callback_metrics) or 'none'}"
        )
    return float(found)


def values_of(
    trainer: Trainer, model: nn.Module, metrics: Mapping[str, Any], known: Mapping[str, float]
) -> dict[str, float]:
    """The values of metrics on the model as it is: what is known, what functions give, and what the validation has logged."""
    found = {}
    for name, metric in metrics.items():
        if name in known:
            found[name] = known[name]
        elif callable(metric):
            # A training that has begun is in another mode than the validation that the first value is from.
            with torch.no_grad(), undisturbed(model):
                found[name] = measured(trainer, name, metric, model)
        elif metric is not None:
            found[name] = logged(trainer, name, metric)
    return found


def searched(found: Search | Trial | None) -> dict[str, float]:
    """What a search has measured already, before (itself) or with a patch (a trial), by the names of metrics."""
    if found is None:
        return {}
    several = {name if name == GENERAL else f"{_GENERAL}{name}": value for name, value in found.general.items()}
    return {"undesired": found.undesired, **several}


def metrics_of(undesired: Any, general: Any, searching: Any = None) -> dict[str, Any]:
    """The metrics by the name that they are logged under; several of the general behaviour are ``general/name``.

    Args:
        undesired: one metric.
        general: one, several by name, or a suite.
        searching: the amount, where one is searched for: all metrics must be functions then.
    """
    check_metric("undesired_metric", undesired)
    several = general.measures() if isinstance(general, Suite) else general
    if isinstance(several, Mapping):
        if not several or not all(callable(metric) for metric in several.values()):
            raise MisconfigurationException(
                "general_metric must be a function of the model, a metric's name, functions by name, or a Suite with at least "
                f"one entry that has a direction, got {general!r}"
            )
        metrics = {"undesired": undesired, **{f"{_GENERAL}{name}": metric for name, metric in several.items()}}
    else:
        check_metric("general_metric", general)
        metrics = {"undesired": undesired, "general": general}
    if searching is not None and not all(callable(metric) for metric in metrics.values()):
        raise MisconfigurationException(
            f"amount={searching!r} measures the model with each patch: pass undesired_metric and general_metric as functions of "
            "the model that return a number"
        )
    return metrics


def general_measures(trainer: Trainer, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a search measures of the general behaviour, the same in all processes; by the names that limits are for."""
    return {
        name.removeprefix(_GENERAL): partial(measured, trainer, "general", metric)
        for name, metric in metrics.items()
        if name != "undesired"
    }


def with_limits(automatic: Automatic | None, general: Any, metrics: Mapping[str, Any]) -> Automatic | None:
    """A search with its limits, each of which is of something that is measured."""
    if automatic is None:
        return None
    names = [name.removeprefix(_GENERAL) for name in metrics if name != "undesired"]
    with misconfiguration():
        return replace(automatic, allowed=checked_limits(automatic.limits(general), names))


def examined(
    trainer: Trainer, patch: Patch, model: nn.Module, suite: Suite, strength: float
) -> tuple[SideEffects, bool]:
    """What a patch does besides, in its description from now on; and whether that is allowed, with a warning where it is not.

    The first process's figures are those of all, since two that are a rounding apart can be on two sides of a limit.
    """
    with agreeing(trainer):
        found = side_effects_of(patch, model, suite, strength)
    found = gathered(trainer, found)[0]
    describe(patch, found, strength, suite.allowed)
    said = patch.provenance["side_effects"]
    rank_zero_info(f"Side effects of the patch against {patch.behaviour!r} at strength {strength:g}:\n{found}")
    if not said["within"]:
        rank_zero_warn(f"refused and not applied, it is in .patch: {said['verdict']}")
    return found, bool(said["within"])


def check_removal(behaviour: Any, strength: Any) -> None:
    """Refuse what is no name of what is removed, and what is no strength."""
    if not isinstance(behaviour, str) or not behaviour:
        raise MisconfigurationException(f"behaviour must be a name for what is removed, got {behaviour!r}")
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise MisconfigurationException(f"strength must be in [0, 1], got {strength!r}")


def checked_suite(suite: Any) -> Suite | None:
    """What a patch is tested on."""
    try:
        chosen = suite if suite is None or isinstance(suite, Suite) else Suite(suite)
    except (ValueError, TypeError) as error:
        raise MisconfigurationException(str(error)) from error
    if chosen is not None and not len(chosen):
        raise MisconfigurationException("suite is empty: give it texts, tokens, a task or a function by name, or None")
    return chosen


def checked_guard(guard: Any) -> Guard | None:
    """What is to be spared; what a callback measures it by it collects itself."""
    with misconfiguration():
        found = guard_of(guard)
    if found is not None and isinstance(found.by, Relevance):
        raise MisconfigurationException(
            "a callback collects what its guard is by: pass the name of a statistic, as in Guard(by='squared_token'), not a "
            "Relevance"
        )
    return found


def check_metric(name: str, metric: Any) -> None:
    """Refuse what is neither a function of the model nor the name of a logged metric."""
    if metric is not None and not callable(metric) and not (isinstance(metric, str) and metric):
        raise MisconfigurationException(
            f"{name} must be a function of the model that returns a number, the name of a metric that the validation logs, or "
            f"None, got {metric!r}"
        )


def checked_amount(amount: Any) -> Automatic | None:
    """How an amount is found by trying some; None for a fraction or a count. Refuses all else."""
    if isinstance(amount, Automatic) or amount == "auto":
        return amount if isinstance(amount, Automatic) else Automatic()
    number = isinstance(amount, int | float) and not isinstance(amount, bool)
    if not (number and (amount >= 1 if isinstance(amount, int) else 0 < amount < 1)):
        raise MisconfigurationException(
            f"amount must be a fraction in (0, 1), a count of at least 1, or 'auto', got {amount!r}"
        )
    return None


def enabled_entries(pl_module: LightningModule) -> dict[str, Tensor]:
    """The entries of patches that are enabled, flat positions by parameter name: a second patch beside them must have others."""
    if not isinstance(pl_module, CorrectedModule):
        return {}
    model = pl_module.module
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    positions = []
    for patch in (pl_module.patches[name] for name, strength in pl_module.strengths.items() if strength):
        parameters = resolve_entries(patch, model)
        positions.append({names[id(parameter)]: patch[entry].positions for entry, parameter in parameters.items()})
    return merged(*positions)
