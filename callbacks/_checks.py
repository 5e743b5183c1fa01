"""What is refused, or warned about, before anything is collected or pruned."""

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ModelPruning
from torch import nn

from lrp_prune.arguments import check_flag, check_integer, check_patterns
from lrp_prune.callbacks._callbacks import callbacks_of
from lrp_prune.models import check_batches
from lrp_prune.names import named_parameters
from lrp_prune.progress import number_of
from lrp_prune.pruning import Compensation, Method, Scope, sparsity_schedule
from lrp_prune.pruning.adjusting import check_alone
from lrp_prune.pruning.compensation import compensation_of
from lrp_prune.pruning.layouts import layouts_of
from lrp_prune.pruning.methods import method_of
from lrp_prune.pruning.schedules import Schedule, rounds_of
from lrp_prune.pruning.scope import settled
from lrp_prune.relevance import granularities_of
from lrp_prune.relevance.unscored import patterns_of
from lrp_prune.selection.scopes import Structure, check_reachable, layout_of, parse_scope


@contextmanager
def misconfiguration(kinds: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """Turns what the engine says about wrong arguments into Lightning's error."""
    try:
        yield
    except kinds as error:
        raise MisconfigurationException(str(error)) from error


def check_choice(name: str, value: Any, choices: Iterable[str], optional: bool = True) -> None:
    """Refuse a value that is none of the choices."""
    if not (optional and value is None) and value not in tuple(choices):
        raise MisconfigurationException(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_count(name: str, value: Any, minimum: int, optional: bool = False) -> None:
    """Refuse what is no integer of at least ``minimum``."""
    if optional and value is None:
        return
    with misconfiguration():
        check_integer(name, value, minimum)


def check_flags(**flags: Any) -> None:
    """Refuse what is neither true nor false."""
    with misconfiguration():
        for name, value in flags.items():
            check_flag(name, value)


def check_logging(name: Any, monitor: Any, monitor_mode: Any) -> None:
    """Check under what names a pruning callback logs, and which metric it watches."""
    if not isinstance(name, str) or not name or "/" in name:
        raise MisconfigurationException(f"name must be a word that metrics' names can begin with, got {name!r}")
    check_choice("monitor_mode", monitor_mode, ("min", "max"), optional=False)
    if monitor is not None and (not isinstance(monitor, str) or not monitor):
        raise MisconfigurationException(
            f"monitor must be None or the name of a metric that is logged in validation_step, got {monitor!r}"
        )


def checked_method(method: Any) -> Method:
    """The method that is meant by a name, or given."""
    with misconfiguration():
        return method_of(method)


def checked_kinds(granularity: Any) -> tuple[str, ...]:
    """What is scored: weights, or kinds of units."""
    with misconfiguration((ValueError, TypeError)):
        return granularities_of(granularity)


def check_weights(include: Any, exclude: Any, trainable_only: Any, accumulate_on: Any) -> None:
    """Check the arguments that say which weights are scored, and where their sums are kept."""
    with misconfiguration():
        check_patterns("include", include)
        check_patterns("exclude", exclude)
        check_flag("trainable_only", trainable_only)
    if accumulate_on is not None:
        try:
            torch.device(accumulate_on)
        except (RuntimeError, TypeError) as error:
            raise MisconfigurationException(f"accumulate_on must name a device, got {accumulate_on!r}") from error


def check_reference(reference: Any, name: str = "reference") -> None:
    """Check what says where reference samples come from: a validation loader's index, ``"all"`` of them, or batches.

    Args:
        reference: what was given.
        name: of the argument; ``"all"`` is for ``"reference"`` alone.
    """
    if isinstance(reference, int) and not isinstance(reference, bool):
        return check_count(name, reference, 0)
    if name == "reference" and isinstance(reference, str) and reference == "all":
        return
    every = "'all' of them, " if name == "reference" else ""
    if isinstance(reference, str | Mapping) or not isinstance(reference, Iterable | LightningDataModule):
        raise MisconfigurationException(
            f"{name} must be the index of a validation loader, {every}batches that can be iterated over "
            f"again (a list, a DataLoader), or a LightningDataModule, got {reference!r}"
        )
    if isinstance(reference, LightningDataModule):
        return
    with misconfiguration():
        check_batches(reference, name)
    if iter_once(reference):
        raise MisconfigurationException(
            f"{name} is a {type(reference).__name__}, which can be iterated over only once, but it is gone "
            "through more often: pass a list or a DataLoader"
        )
    if number_of(reference) == 0:
        raise MisconfigurationException(
            f"{name} is an empty {type(reference).__name__}: pass at least one batch, or the index of a validation loader"
        )


def iter_once(batches: Any) -> bool:
    """Whether this is an iterator, such as a generator, and not a collection."""
    return hasattr(batches, "__next__")


def checked_rounds(schedule: Schedule, rounds: int | None) -> int:
    """How many rounds there are: as is asked for, else one for each number of a list, else one."""
    with misconfiguration():
        return rounds_of(schedule, rounds) or 1


def check_schedule(
    sparsity: Any, rounds: int, schedule: Schedule, scope: Scope
) -> list[float] | list[dict[str, float]]:
    """Check how much is pruned, and return the total sparsity after each round."""
    with misconfiguration((ValueError, TypeError)):
        targets = sparsity_schedule(schedule, sparsity, rounds)
        structure = parse_scope(scope.compared or "global")
    if isinstance(structure, Structure):
        for target in targets:
            for value in target.values() if isinstance(target, dict) else [target]:
                if structure.kept is None:
                    with misconfiguration():
                        check_reachable(structure, value)
                    continue
                only = 1 - structure.kept / structure.size
                if abs(value - only) > 1e-6:
                    raise MisconfigurationException(
                        f"scope {scope.compared!r} prunes {only:g} of the weights, so that a total sparsity of {value:g} "
                        f"cannot be reached with it: set sparsity={only:g} and rounds=1 (or schedule='one_shot'), or "
                        "another scope"
                    )
    return targets


def checked_scope(scope: Any, method: Method, kinds: tuple[str, ...]) -> Scope:
    """:func:`~lrp_prune.pruning.scope.settled`; what it refuses is refused as a callback's arguments are."""
    with misconfiguration():
        return settled(scope, method, kinds)


def known_layouts(pl_module: nn.Module, names: Iterable[str], data: bool) -> dict[str, str | None]:
    """What a row of each weight is, as far as it is known before the model has run.

    Args:
        pl_module: the model.
        names: of the weights.
        data: whether uses in a forward will tell; else shapes do, where modules do not.
    """
    parameters, known = named_parameters(pl_module), layouts_of(pl_module)
    shapes = {name: tuple(parameters[name].shape) for name in names if name in parameters}
    return {name: known.get(name, None if data or name not in shapes else layout_of(shapes[name])) for name in names}


def frozen_since(pl_module: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Those of some weights that require no gradient, or that the module has no more; with their numbers of entries."""
    parameters = named_parameters(pl_module)
    found = {name: parameters.get(name) for name in sorted(names)}
    return {
        name: 0 if parameter is None else parameter.numel()
        for name, parameter in found.items()
        if parameter is None or not parameter.requires_grad
    }


def checked_key(callback: Callback, key: str, way_out: str) -> str:
    """A callback's state key; refuses a second callback with the same one, and says what to do about it.

    Lightning refuses it as well, when the trainer is made, but says neither which callbacks nor what to do. It asks all of them
    for their keys in one function; where there is none of that name any more, its own message is left.

    Args:
        callback: whose key is asked for, as a property.
        key: the key.
        way_out: what makes it another one.
    """
    asking = sys._getframe(2)
    if asking.f_code.co_name == "_validate_callbacks_list":
        same = [other for other in asking.f_locals.get("callbacks", ()) if type(other) is type(callback)]
        known = asking.f_locals.get("seen_callbacks", ())
        if len(same) > 1 and key in known:
            raise MisconfigurationException(
                f"there are {len(same)} {type(callback).__name__} callbacks, two of which would have the same state in a "
                f"checkpoint: leave one out, or {way_out}"
            )
    return key


def check_other_pruning(trainer: Trainer, name: str) -> None:
    """Refuse Lightning's own pruning callbacks beside ours: both would keep masks of the same weights."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, ModelPruning):
            raise MisconfigurationException(
                f"{type(callback).__name__} of Lightning and {name} would both prune this model, and the former renames weights: "
                "use one of them. RelevancePruning(method='magnitude', scope='layer') prunes as l1_unstructured does"
            )


def names_of(trainer: Trainer, kind: type[Any]) -> list[str]:
    """The names of all callbacks of a kind."""
    return [callback.name for callback in callbacks_of(trainer) if isinstance(callback, kind)]


def check_names(names: Sequence[str]) -> None:
    """Refuse pruning callbacks that would log under one name."""
    name = next((name for name in names if names.count(name) > 1), None)
    if name is not None:
        raise MisconfigurationException(
            f"several RelevancePruning callbacks would log {name}/sparsity, each of other weights: give each a name, as "
            "in RelevancePruning(..., name='attention')"
        )


def check_apart(name: str, claimed: Set[str], other: str, theirs: Set[str]) -> None:
    """Refuse two pruning callbacks that prune the same.

    Args:
        name: of the one.
        claimed: what it prunes.
        other: the name of the other.
        theirs: what that prunes.
    """
    both = sorted(claimed & theirs)
    if both:
        raise MisconfigurationException(
            f"RelevancePruning(name={other!r}) and RelevancePruning(name={name!r}) would both prune "
            f"{', '.join(patterns_of(both))}, and neither would log what is pruned of it: part them by include= and exclude="
        )


def checked_compensation(compensation: Any, recalibrate: bool) -> Compensation | None:
    """How what is kept is updated; refuses what is none of the ways, and one beside recalibration."""
    with misconfiguration():
        found = compensation_of(compensation)
        check_alone(found, recalibrate)
    return found


def warn_monitors(trainer: Trainer, names: Collection[str]) -> None:
    """Warn about callbacks that compare a metric of the dense model with one of the pruned model.

    Args:
        trainer: the run.
        names: of its pruning callbacks, which their metrics begin with.
    """
    for callback in callbacks_of(trainer):
        monitor = getattr(callback, "monitor", None)
        if monitor is None or monitor.partition("/")[0] in names:
            continue
        final = f"{next(iter(names))}/{monitor}"
        if isinstance(callback, ModelCheckpoint):
            rank_zero_warn(
                f"ModelCheckpoint(monitor={monitor!r}) compares models of different sparsity, and keeps a dense one "
                f"where that is better: pass monitor={monitor!r} to RelevancePruning and let ModelCheckpoint monitor {final!r}, "
                "which counts from the last round on (or keep the last checkpoint by save_last=True)"
            )
        elif isinstance(callback, EarlyStopping):
            rank_zero_warn(
                f"EarlyStopping(monitor={monitor!r}) may stop the training when a round makes {monitor!r} worse, "
                f"before all rounds are done: pass monitor={monitor!r} to RelevancePruning and let "
                f"EarlyStopping monitor {final!r}, which counts from the last round on"
            )
