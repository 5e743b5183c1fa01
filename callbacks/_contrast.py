"""Reference sets collected in one validation, metrics of what is to stay, and what a patch does besides."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lrp_prune.callbacks._checks import checked_kinds, checked_method, misconfiguration
from lrp_prune.callbacks._collection import Collection
from lrp_prune.callbacks._distributed import agreeing, gathered
from lrp_prune.correction import Automatic, Patch, side_effects_of
from lrp_prune.correction.combining import merged
from lrp_prune.correction.guard import Guard, guard_of
from lrp_prune.correction.several import General
from lrp_prune.correction.verifying import resolve_entries
from lrp_prune.effects import SideEffects, Suite
from lrp_prune.names import named_parameters
from lrp_prune.pruning import Method
from lrp_prune.relevance import Relevance
from lrp_prune.targets import checked
from lrp_prune.wrapper.module import CorrectedModule

Source = int | Iterable[Any]
_GENERAL = "general/"


class _InnerCollection(Collection):
    """Scores the model inside a wrapper, so that names are those of the bare model."""

    def _make_scorer(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        model: Any = pl_module.module if isinstance(pl_module, CorrectedModule) else pl_module
        return super()._make_scorer(trainer, model)


class ReferenceSets:
    """Collects the relevance of general sets and of an undesired one, and of the general ones for a guard.

    Args:
        general: index of a validation loader, or batches; or several of these by name.
        undesired: likewise.
        method: by which.
        undesired_target: what is explained on the undesired set, if it is something else.
        guard: may say in which statistic the general set is collected a second time.
        max_batches: of each set.
        **options: of the collections.

    Raises:
        MisconfigurationException: both sets are the same loader, or an argument is impossible.
    """

    def __init__(
        self,
        general: Source | Mapping[str, Source],
        undesired: Source,
        *,
        method: str | Method,
        undesired_target: Any,
        guard: Guard | None,
        max_batches: int | None,
        **options: Any,
    ) -> None:
        self._named = isinstance(general, Mapping)
        sets: dict[str, Source] = dict(general) if isinstance(general, Mapping) else {"general": general}
        if not sets:
            raise MisconfigurationException("general names no set: give each a validation loader's index, or batches")
        for name, source in sets.items():
            if isinstance(source, int) and source == undesired:
                raise MisconfigurationException(
                    f"{name} and undesired are both validation loader {source}: their contrast is nothing"
                )
        self._names = list(sets)
        own = _signed(checked_method(method), checked_kinds(options["granularity"]))

        def collection(argument: str, source: int | Iterable[Any], method: Method) -> Collection:
            return _InnerCollection(
                method=method, reference=source, argument=argument, max_batches=max_batches, **options
            )

        with_target = own if undesired_target is None else _changed(own, target=undesired_target)
        self._collections = [collection("general", source, own) for source in sets.values()]
        self._collections.append(collection("undesired", undesired, with_target))
        if guard is not None and guard.by is not None:
            guarding = _changed(own, statistic=guard.by)
            self._collections += [collection("general", source, guarding) for source in sets.values()]
        self._indices = [source for source in (*sets.values(), undesired) if isinstance(source, int)]

    @property
    def uses_validation(self) -> bool:
        """Whether one of the sets is a validation loader."""
        return bool(self._indices)

    def rehearse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try each collection on one batch before the training begins, see :meth:`Collection.rehearse`."""
        self._check_loaders(trainer)
        for collection in self._collections:
            collection.rehearse(trainer, pl_module)

    def remember(self, batch: Any, dataloader_idx: int) -> None:
        """Keep the first batch of each set that the sanity check has."""
        for collection in self._collections:
            collection.remember(batch, dataloader_idx)

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the validation that begins.

        Raises:
            MisconfigurationException: there is no such loader.
        """
        self._check_loaders(trainer)
        for collection in self._collections:
            if collection.uses_validation:
                collection.start(trainer, pl_module)

    def _check_loaders(self, trainer: Trainer) -> None:
        loaders = len(trainer.num_val_batches)
        for index in self._indices:
            if index >= loaders:
                raise MisconfigurationException(
                    f"validation loader {index} is a reference set, but there are {loaders}: pass all sets as validation "
                    "loaders, or batches as general= and undesired="
                )

    def observe(self, batch: Any, dataloader_idx: int) -> None:
        """Add a validation batch to the set that it belongs to."""
        for collection in self._collections:
            collection.observe(batch, dataloader_idx)

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> tuple[General, Relevance, General | None]:
        """General, undesired, and general for the guard; by name where several sets are named."""
        found = [
            collection.finish(trainer) if collection.active else collection.run(trainer, pl_module)
            for collection in self._collections
        ]
        sets = len(self._names)
        general, undesired, guard = found[:sets], found[sets], found[sets + 1 :]
        return self._by_name(general), undesired, self._by_name(guard) if guard else None

    def _by_name(self, found: list[Relevance]) -> General:
        return dict(zip(self._names, found, strict=True)) if self._named else found[0]

    def abandon(self) -> None:
        """Forget the collection under way."""
        for collection in self._collections:
            collection.abandon()


def _signed(method: Method, kinds: tuple[str, ...]) -> Method:
    """The method, in the statistic ``"signed"`` where it leaves it open: what serves one set and harms the other has a sign."""
    if not method.explains(kinds):
        raise MisconfigurationException(
            f"method {str(method)!r} explains nothing, so that two sets cannot be told apart by it: use LRP() or Gradient()"
        )
    open_statistic = getattr(method, "statistic", "") is None
    return _changed(method, statistic="signed") if open_statistic else method


def _changed(method: Method, **changes: Any) -> Method:
    try:
        if "target" in changes:
            checked(changes["target"])
            return method.with_target(changes["target"])
        return replace(method, **changes)  # type: ignore[type-var]  # whether it is a dataclass is what is tried
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    except TypeError as error:
        raise MisconfigurationException(
            f"method {str(method)!r} has no {', '.join(changes)} to choose: {error}"
        ) from error


def measured(trainer: Trainer, name: str, metric: Any, model: nn.Module) -> float:
    """The mean of what a metric gives in all processes, so that all of them decide alike.

    Raises:
        Exception: the metric's own.
        MisconfigurationException: it gives no number.
        OtherProcessError: it failed in another process.
    """
    with agreeing(trainer):
        found = metric(model)
        try:
            value = float(found)
        except (TypeError, ValueError, RuntimeError) as error:
            raise MisconfigurationException(f"{name}_metric must return a number, got {found!r}") from error
    values: list[float] = gathered(trainer, value)
    return sum(values) / len(values)


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


def examined(patch: Patch, model: nn.Module, suite: Suite, strength: float) -> tuple[SideEffects, bool]:
    """What a patch does besides, in its description from now on; and whether that is allowed, with a warning where it is not."""
    found = side_effects_of(patch, model, suite, strength)
    said = patch.provenance["side_effects"]
    rank_zero_info(f"Side effects of the patch against {patch.behaviour!r} at strength {strength:g}:\n{found}")
    if not said["within"]:
        rank_zero_warn(f"refused and not applied, it is in .patch: {said['verdict']}")
    return found, bool(said["within"])


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
