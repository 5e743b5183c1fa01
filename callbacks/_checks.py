"""What is refused, or warned about, before anything is collected or pruned."""

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ModelPruning
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn

from lrp_prune.attribution.composites import COMPOSITES, Composite
from lrp_prune.models import check_batches
from lrp_prune.names import named_parameters
from lrp_prune.pruning import sparsity_schedule
from lrp_prune.pruning.keys import RANKINGS
from lrp_prune.pruning.schedules import SCHEDULES, Schedule
from lrp_prune.pruning.scopes import Structure, layout_of, parse_scope
from lrp_prune.pruning.scorers import METHODS, PROPAGATING, selection_options
from lrp_prune.relevance import NORMALIZATIONS, granularities_of
from lrp_prune.statistics import OF_RELEVANCE, Statistic
from lrp_prune.targets import checked

STRATEGIES = (SingleDeviceStrategy, DDPStrategy)


def check_choice(name: str, value: Any, choices: Iterable[str], optional: bool = True) -> None:
    """Refuse a value that is none of the choices."""
    if not (optional and value is None) and value not in tuple(choices):
        raise MisconfigurationException(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_count(name: str, value: Any, minimum: int, optional: bool = False) -> None:
    """Refuse what is no integer of at least ``minimum``."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise MisconfigurationException(f"{name} must be an integer of at least {minimum}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither true nor false."""
    if not isinstance(value, bool):
        raise MisconfigurationException(f"{name} must be true or false, got {value!r}")


def check_patterns(name: str, value: Any) -> None:
    """Refuse what is no list of name patterns; a single string would be read letter by letter."""
    if value is not None and (isinstance(value, str) or not all(isinstance(pattern, str) for pattern in value)):
        raise MisconfigurationException(f"{name} must be a list of name patterns such as ['*.mlp'], got {value!r}")


def check_collection(
    *,
    method: Any,
    composite: Any,
    statistic: Any,
    granularity: Any,
    target: Any,
    include: Any,
    exclude: Any,
    seed: Any,
    trainable_only: Any,
    accumulate_on: Any,
    max_batches: Any,
    dataloader: Any,
    reference: Any,
) -> None:
    """Check the arguments that say how relevance is collected."""
    check_choice("method", method, METHODS, optional=False)
    if not isinstance(composite, Composite):
        check_choice("composite", composite, COMPOSITES)
    if not isinstance(statistic, Statistic):
        check_choice("statistic", statistic, OF_RELEVANCE)
    try:
        granularities_of(granularity)
    except (ValueError, TypeError) as error:
        raise MisconfigurationException(str(error)) from error
    if method not in PROPAGATING and (composite is not None or statistic is not None):
        raise MisconfigurationException(
            f"method={method!r} has neither composite nor statistic, got composite={composite!r}, statistic={statistic!r}: "
            "leave them out, or use method='lrp'"
        )
    if method == "gradient" and composite not in (None, "gradient"):
        raise MisconfigurationException(f"method='gradient' has no composite, got {composite!r}: use method='lrp'")
    if target is not None:
        try:
            checked(target)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
    check_patterns("include", include)
    check_patterns("exclude", exclude)
    check_count("max_batches", max_batches, 1, optional=True)
    check_count("dataloader", dataloader, 0, optional=True)
    check_count("seed", seed, 0)
    check_flag("trainable_only", trainable_only)
    if accumulate_on is not None:
        try:
            torch.device(accumulate_on)
        except (RuntimeError, TypeError) as error:
            raise MisconfigurationException(f"accumulate_on must name a device, got {accumulate_on!r}") from error
    if reference is not None and (
        isinstance(reference, str | Mapping) or not isinstance(reference, Iterable | LightningDataModule)
    ):
        raise MisconfigurationException(
            f"reference must be batches that can be iterated over again (a list, a DataLoader) or a "
            f"LightningDataModule, got {type(reference).__name__}"
        )
    if reference is not None and not isinstance(reference, LightningDataModule):
        try:
            check_batches(reference, "reference")
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
    if reference is not None and iter_once(reference):
        raise MisconfigurationException(
            f"reference is a {type(reference).__name__}, which can be iterated over only once, but each round needs "
            "it: pass a list or a DataLoader"
        )


def iter_once(batches: Any) -> bool:
    """Whether this is an iterator, such as a generator, and not a collection."""
    return hasattr(batches, "__next__")


def check_selection(
    sparsity: Any, rounds: int, schedule: Schedule, scope: str | None, ranking: str, normalize: str | None
) -> list[float] | list[dict[str, float]]:
    """Check what is pruned, and return the total sparsity after each round."""
    check_count("rounds", rounds, 1)
    if not (isinstance(schedule, str | Sequence) or callable(schedule)):
        raise MisconfigurationException(
            f"schedule must be one of {', '.join(SCHEDULES)}, a list of {rounds} numbers or a callable, got "
            f"{schedule!r}"
        )
    check_choice("ranking", ranking, RANKINGS, optional=False)
    check_choice("normalize", normalize, ("auto", *NORMALIZATIONS))
    try:
        targets = sparsity_schedule(schedule, sparsity, rounds)
        structure = parse_scope(scope) if scope is not None else None
    except (ValueError, TypeError) as error:
        raise MisconfigurationException(str(error)) from error
    if isinstance(structure, Structure):
        only = 1 - structure.kept / structure.size
        for target in targets:
            for value in target.values() if isinstance(target, dict) else [target]:
                if abs(value - only) > 1e-6:
                    raise MisconfigurationException(
                        f"scope {scope!r} prunes {only:g} of the weights, so that a total sparsity of {value:g} "
                        f"cannot be reached with it: set sparsity={only:g} and rounds=1 (or schedule='one_shot'), or "
                        "another scope"
                    )
    return targets


def selection_of(*arguments: Any) -> dict[str, Any]:
    """:func:`~lrp_prune.pruning.scorers.selection_options`; what it refuses is refused as a callback's arguments are."""
    try:
        return selection_options(*arguments)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error


def layouts_of(pl_module: nn.Module, names: Iterable[str], data: bool) -> dict[str, str | None]:
    """What a row of each weight is, as far as it is known before the model has run.

    Args:
        pl_module: the model.
        names: of the weights.
        data: whether uses in a forward will tell; else shapes do.
    """
    parameters, layers = named_parameters(pl_module), set()
    for module in pl_module.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            layers.add(id(module.weight))
    known = {name: layout_of(tuple(parameters[name].shape)) for name in names if name in parameters}
    return {name: known.get(name) if not data or id(parameters.get(name)) in layers else None for name in names}


def check_validation(trainer: Trainer, name: str, what: str) -> None:
    """Refuse a training without validations for a callback that works in them and nowhere else."""
    if not trainer.enable_validation:
        raise MisconfigurationException(
            f"{name} {what} at the end of validations, but this training has none: give it a validation loader and a "
            "validation_step (and limit_val_batches > 0), or call trainer.validate afterwards"
        )


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
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's callback connector
        if isinstance(callback, ModelPruning):
            raise MisconfigurationException(
                f"{type(callback).__name__} of Lightning and {name} would both prune this model, and the former renames weights: "
                "use one of them. RelevancePruning(method='magnitude', scope='layer') prunes as l1_unstructured does"
            )


def check_strategy(trainer: Trainer, name: str, allow_untested: bool, sharded: bool = False) -> None:
    """Refuse strategies for which nothing is tested; subclasses count as others (DeepSpeed's is one of DDP's).

    Args:
        trainer: the run.
        name: of the callback.
        allow_untested: warn only.
        sharded: whether the callback works on parameters that ``fully_shard`` has divided.
    """
    strategy = trainer.strategy
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        rank_zero_warn(
            f"this strategy starts processes that give back the model's weights only: what {name} finds stays in them. Take "
            "it from a checkpoint, write it in a hook of your own (on_fit_end), or use strategy='ddp'"
        )
    if type(strategy) is ModelParallelStrategy and sharded:
        if strategy.device_mesh["tensor_parallel"].size() > 1:
            raise MisconfigurationException(
                f"{name} works on weights that fully_shard has divided, not under tensor parallelism: use "
                f"ModelParallelStrategy(data_parallel_size={trainer.world_size}, tensor_parallel_size=1)"
            )
        return
    if type(strategy) in STRATEGIES:
        return
    tested = "'auto' on one device and 'ddp' in all its variants" + (", and ModelParallelStrategy" if sharded else "")
    message = f"{name} is tested with the strategies {tested}, not with {type(strategy).__name__}"
    remedy = "use one of those"
    if sharded and isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
        remedy = (
            "use ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1), and shard the model in "
            "configure_model by torch.distributed.fsdp.fully_shard"
        )
    if not allow_untested:
        raise MisconfigurationException(f"{message}: {remedy}, or pass allow_untested=True to try")
    rank_zero_warn(f"{message}: you asked for it by allow_untested=True")


def warn_unguarded_monitors(trainer: Trainer, names: Collection[str]) -> None:
    """Warn about callbacks that compare a metric of the dense model with one of the pruned model.

    Args:
        trainer: the run.
        names: of its pruning callbacks, which their metrics begin with.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's callback connector
        monitor = getattr(callback, "monitor", None)
        if monitor is None or monitor.partition("/")[0] in names:
            continue
        guarded = f"{next(iter(names))}/{monitor}"
        if isinstance(callback, ModelCheckpoint):
            rank_zero_warn(
                f"ModelCheckpoint(monitor={monitor!r}) compares models of different sparsity, and keeps a dense one "
                f"where that is better: pass guard={monitor!r} to RelevancePruning and monitor {guarded!r}, "
                "which counts from the last round on (or keep the last checkpoint by save_last=True)"
            )
        elif isinstance(callback, EarlyStopping):
            rank_zero_warn(
                f"EarlyStopping(monitor={monitor!r}) may stop the training when a round makes {monitor!r} worse, "
                f"before all rounds are done: pass guard={monitor!r} to RelevancePruning and monitor "
                f"{guarded!r}, which counts from the last round on"
            )
