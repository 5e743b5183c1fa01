"""Two reference sets collected in one validation, and the table of a search over the amount."""

import math
from collections.abc import Iterable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lrp_prune.callbacks._checks import check_choice
from lrp_prune.callbacks._collection import Collection
from lrp_prune.callbacks._distributed import agree, gathered
from lrp_prune.correction import Search
from lrp_prune.module import CorrectedModule
from lrp_prune.relevance import Relevance
from lrp_prune.statistics import OF_RELEVANCE


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
        targets: what is explained on each.
        guard_statistic: in which the general set is collected a second time, if given.
        skip_first: tokens at the beginning that enter no statistic; None for the method's own.
        max_batches: of each set.
        **options: of the scorer.

    Raises:
        MisconfigurationException: both sets are the same loader, or an argument is impossible.
    """

    def __init__(
        self,
        general: int | Iterable[Any],
        undesired: int | Iterable[Any],
        *,
        targets: tuple[Any, Any],
        guard_statistic: str | None,
        skip_first: int | None,
        max_batches: int | None,
        **options: Any,
    ) -> None:
        if isinstance(general, int) and general == undesired:
            raise MisconfigurationException(
                f"general and undesired are both validation loader {general}: their contrast is nothing"
            )
        check_choice("guard_statistic", guard_statistic, OF_RELEVANCE)

        def collection(source: int | Iterable[Any], target: Any, **changes: Any) -> Collection:
            index = source if isinstance(source, int) else None
            made = _InnerCollection(
                method="lrp",
                max_batches=max_batches,
                dataloader=index,
                reference=None if isinstance(source, int) else source,
                target=target,
                seed=0,
                trainable_only=False,
                **{**options, **changes},
            )
            made.options["skip_first"] = skip_first
            return made

        self._collections = [collection(general, targets[0]), collection(undesired, targets[1])]
        if guard_statistic is not None:
            self._collections.append(collection(general, targets[0], statistic=guard_statistic))
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


def measured(trainer: Trainer, metric: Any, model: nn.Module) -> float:
    """The mean of what a metric gives in all processes, so that all of them decide alike.

    Raises:
        Exception: the metric's own.
        RuntimeError: it failed in another process.
    """
    value, failure = math.nan, None
    try:
        value = float(metric(model))
    except Exception as error:
        failure = error
    agree(trainer, failure)
    values: list[float] = gathered(trainer, value)
    return sum(values) / len(values)


def search_table(search: Search, behaviour: str) -> str:
    """The trials of a search as text, the chosen one marked."""
    lines = [
        f"Search for the smallest correction of {behaviour!r}: undesired {search.undesired:.4g}, guard {search.guard:.4g}"
        " before",
        f"  {'entries':>12} {'undesired':>11} {'reduction':>10} {'guard':>11} {'loss':>9}",
    ]
    chosen = search.patch.num_entries if search.patch is not None else None
    for trial in search.curve:
        mark = "*" if trial.entries == chosen else " "
        lines.append(
            f"{mark} {trial.entries:>12,} {trial.undesired:>11.4g} {trial.reduction:>10.1%} {trial.guard:>11.4g} "
            f"{trial.loss:>9.2%}"
        )
    return "\n".join(lines)


def check_amount(name: str, amount: Any) -> None:
    """Refuse what is neither a fraction, nor a count, nor ``"auto"``."""
    number = isinstance(amount, int | float) and not isinstance(amount, bool)
    if amount != "auto" and not (number and (amount >= 1 if isinstance(amount, int) else 0 < amount < 1)):
        raise MisconfigurationException(
            f"{name} must be a fraction in (0, 1), a count of at least 1, or 'auto', got {amount!r}"
        )
