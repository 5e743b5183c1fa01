"""Two reference sets collected in one validation, and the table of a search over the amount."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lrp_prune.callbacks._checks import checked_kinds, checked_method, misconfiguration
from lrp_prune.callbacks._collection import Collection
from lrp_prune.callbacks._distributed import agreeing, gathered
from lrp_prune.correction import Automatic, Search
from lrp_prune.correction.guard import Guard, guard_of
from lrp_prune.pruning import Method
from lrp_prune.relevance import Relevance
from lrp_prune.targets import checked
from lrp_prune.wrapper.module import CorrectedModule


class _InnerCollection(Collection):
    """Scores the model inside a wrapper, so that names are those of the bare model."""

    def _make_scorer(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        model: Any = pl_module.module if isinstance(pl_module, CorrectedModule) else pl_module
        return super()._make_scorer(trainer, model)


class ReferenceSets:
    """Collects the relevance of a general and of an undesired set, and of the general one for a guard.

    Args:
        general: index of a validation loader, or batches.
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
        general: int | Iterable[Any],
        undesired: int | Iterable[Any],
        *,
        method: str | Method,
        undesired_target: Any,
        guard: Guard | None,
        max_batches: int | None,
        **options: Any,
    ) -> None:
        if isinstance(general, int) and general == undesired:
            raise MisconfigurationException(
                f"general and undesired are both validation loader {general}: their contrast is nothing"
            )
        own = _signed(checked_method(method), checked_kinds(options["granularity"]))

        def collection(argument: str, source: int | Iterable[Any], method: Method) -> Collection:
            return _InnerCollection(
                method=method, reference=source, argument=argument, max_batches=max_batches, **options
            )

        with_target = own if undesired_target is None else _changed(own, target=undesired_target)
        self._collections = [collection("general", general, own), collection("undesired", undesired, with_target)]
        if guard is not None and guard.by is not None:
            self._collections.append(collection("general", general, _changed(own, statistic=guard.by)))
        self._indices = [source for source in (general, undesired) if isinstance(source, int)]

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
                    f"validation loader {index} is a reference set, but there are {loaders}: pass both sets as validation "
                    "loaders, or batches as general= and undesired="
                )

    def observe(self, batch: Any, dataloader_idx: int) -> None:
        """Add a validation batch to the set that it belongs to."""
        for collection in self._collections:
            collection.observe(batch, dataloader_idx)

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Relevance, Relevance, Relevance | None]:
        """General, undesired, and general for the guard."""
        found = [
            collection.finish(trainer) if collection.active else collection.run(trainer, pl_module)
            for collection in self._collections
        ]
        return found[0], found[1], found[2] if len(found) > 2 else None

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


def search_table(search: Search, behaviour: str) -> str:
    """The trials of a search as text, the chosen one marked."""
    lines = [
        f"Search for the smallest correction of {behaviour!r}: undesired {search.undesired:.4g}, general {search.general:.4g}"
        " before",
        f"  {'entries':>12} {'undesired':>11} {'reduction':>10} {'general':>11} {'loss':>9}",
    ]
    chosen = search.patch.num_entries if search.patch is not None else None
    for trial in search.curve:
        mark = "*" if trial.entries == chosen else " "
        lines.append(
            f"{mark} {trial.entries:>12,} {trial.undesired:>11.4g} {trial.reduction:>10.1%} {trial.general:>11.4g} "
            f"{trial.loss:>9.2%}"
        )
    return "\n".join(lines)


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
