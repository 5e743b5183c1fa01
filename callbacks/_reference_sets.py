"""Reference sets collected side by side in one validation: the general ones, the undesired one, and what a guard is by."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lrp_prune.callbacks._batches import Source, batches_by_loader
from lrp_prune.callbacks._checks import checked_kinds, checked_method
from lrp_prune.callbacks._collection import Collection
from lrp_prune.callbacks._condition import Conditioned, ConditionSets
from lrp_prune.callbacks._corrected import inner
from lrp_prune.correction import Learned
from lrp_prune.correction.guard import Guard
from lrp_prune.correction.several import General
from lrp_prune.pruning import Method
from lrp_prune.relevance import Relevance
from lrp_prune.targets import checked


class _InnerCollection(Collection):
    """Scores the model inside a wrapper, so that names are those of the bare model."""

    def _make_scorer(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        model: Any = inner(pl_module)
        return super()._make_scorer(trainer, model)


class ReferenceSets:
    """Collects the relevance of general sets and of an undesired one, and of the general ones for a guard.

    Args:
        general: index of a validation loader, or batches; or several of these by name.
        undesired: likewise.
        method: by which.
        undesired_target: what is explained on the undesired set, if it is something else.
        guard: may say in which statistic what is to be spared is collected a second time.
        reverse: whether that is the undesired set, not the general one.
        max_batches: of each set.
        condition: what is learned of the same sets, if anything is.
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
        reverse: bool,
        max_batches: int | None,
        condition: Learned | None = None,
        **options: Any,
    ) -> None:
        self._named, self._reverse = isinstance(general, Mapping), reverse
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
            explained, spared = (with_target, [undesired]) if reverse else (own, list(sets.values()))
            guarding = _changed(explained, statistic=guard.by)
            role = "undesired" if reverse else "general"
            self._collections += [collection(role, source, guarding) for source in spared]
        self._conditions = None if condition is None else ConditionSets(condition, sets, undesired, max_batches)
        self.conditioned: Conditioned | None = None
        """What was learned of them."""
        self._indices = [source for source in (*sets.values(), undesired) if isinstance(source, int)]

    @property
    def uses_validation(self) -> bool:
        """Whether one of the sets is a validation loader."""
        return bool(self._indices)

    @property
    def sharded(self) -> bool:
        """Whether the model may be divided among processes: not for a patch under a condition, which is for whole weights."""
        return self._conditions is None

    def check(self, pl_module: LightningModule) -> None:
        """Raise now what can be known without data: a condition on a module that there is not."""
        if self._conditions is not None:
            self._conditions.check(pl_module)

    def rehearse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try each collection on one batch before the training begins, see :meth:`Collection.rehearse`."""
        self._check_loaders(trainer)
        for collection in self._collections:
            collection.rehearse(trainer, pl_module)
        if self._conditions is not None:
            self._conditions.rehearse(trainer, pl_module)

    def remember(self, batch: Any, dataloader_idx: int) -> None:
        """Keep the first batch of each set that the sanity check has."""
        for collection in self._collections:
            collection.remember(batch, dataloader_idx)
        if self._conditions is not None:
            self._conditions.remember(batch, dataloader_idx)

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the validation that begins.

        Raises:
            MisconfigurationException: there is no such loader.
        """
        self._check_loaders(trainer)
        for collection in self._collections:
            if collection.uses_validation:
                collection.start(trainer, pl_module)
        if self._conditions is not None:
            self._conditions.start(trainer, pl_module)

    def _check_loaders(self, trainer: Trainer) -> None:
        loaders = len(batches_by_loader(trainer))
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
        if self._conditions is not None:
            self._conditions.observe(batch, dataloader_idx)

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> tuple[General, Relevance, General | None]:
        """General, undesired, and what the guard is by; by name where several sets are named."""
        found = [
            collection.finish(trainer) if collection.active else collection.run(trainer, pl_module)
            for collection in self._collections
        ]
        if self._conditions is not None:
            self.conditioned = self._conditions.finish(trainer, pl_module)
        sets = len(self._names)
        general, undesired, guard = self._by_name(found[:sets]), found[sets], found[sets + 1 :]
        if not guard:
            return general, undesired, None
        return general, undesired, guard[0] if self._reverse else self._by_name(guard)

    def _by_name(self, found: list[Relevance]) -> General:
        return dict(zip(self._names, found, strict=True)) if self._named else found[0]

    def abandon(self) -> None:
        """Forget the collection under way."""
        for collection in self._collections:
            collection.abandon()
        if self._conditions is not None:
            self._conditions.abandon()


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
