"""Collecting relevance inside a Lightning run: from the batches of a validation, or from reference data."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.fabric.utilities import rank_zero_only
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lrp_prune.attribution.composites import Composite
from lrp_prune.attribution.observers import check_included
from lrp_prune.callbacks._batches import batches_of, number_of_batches, to_device, validation_batches
from lrp_prune.callbacks._checks import check_collection
from lrp_prune.callbacks._distributed import agree, check_targets, gathered, merged
from lrp_prune.callbacks._progress import CollectionProgress
from lrp_prune.pruning import scorers
from lrp_prune.pruning.checking import check_prunable
from lrp_prune.targets import Inferred
from lrp_prune.unscored import UnscoredWeightsWarning

if TYPE_CHECKING:
    from lrp_prune.relevance import Relevance


class Collection:
    """Scores a module's weights by one method, batch by batch; used by each callback that needs relevance.

    Between :meth:`start` and :meth:`finish` there is one scorer, which takes the batches given to :meth:`observe`. The
    scorer runs the model by itself and leaves modes, random state and ``.grad`` as they were.

    Args:
        method, composite, statistic, granularity, target, include, exclude, seed, trainable_only, accumulate_on:
            see :class:`~lrp_prune.callbacks.RelevancePruning`; ``None`` leaves the choice to the method.
        max_batches: batches used of each pass over the data.
        dataloader: index of the validation loader whose batches are used, ``None`` for all.
        reference: batches, a loader or a data module, instead of the validation's batches.

    Raises:
        MisconfigurationException: an argument has a value that is not possible.
    """

    def __init__(
        self,
        *,
        method: str,
        max_batches: int | None,
        dataloader: int | None,
        reference: "Iterable[Any] | LightningDataModule | None",
        **options: Any,
    ) -> None:
        composite = options.get("composite")
        if isinstance(composite, Mapping):
            with _misconfiguration():
                options["composite"] = Composite("custom", composite)
        check_collection(method=method, max_batches=max_batches, dataloader=dataloader, reference=reference, **options)
        self.method = method
        self.max_batches = max_batches
        self.dataloader = dataloader
        self.reference = reference
        self.options = options
        self._inferred = Inferred()  # once for all rounds
        self._scorer: Any = None
        self._progress: CollectionProgress | None = None
        self._taken = 0
        self._alone = True
        self._failure: Exception | None = None
        self._first: Any = None

    @property
    def needs_data(self) -> bool:
        """Whether the method looks at data at all."""
        return scorers.defaults_of(self.method, self.options.get("granularity") or "weight").needs_data

    @property
    def explains(self) -> bool:
        """Whether the method explains a value that the model computes."""
        return self.method in scorers.PROPAGATING

    @property
    def uses_validation(self) -> bool:
        """Whether the data are the validation's batches: there is no reference, and the method needs data."""
        return self.reference is None and self.needs_data

    @property
    def active(self) -> bool:
        """Whether a collection is under way."""
        return self._scorer is not None

    def check(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, torch.Tensor]:
        """Raise now what can be known without data: patterns that match nothing, a module that cannot be run.

        Returns:
            The weights that will be scored, by name; nothing where units are.
        """
        scorer = self._make_scorer(trainer, pl_module)
        return scorer.parameters if self.options["granularity"] == "weight" else {}

    def check_loader(self, trainer: Trainer) -> None:
        """Raise now if there is no such validation loader."""
        loaders = len(trainer.num_val_batches)
        if self.uses_validation and self.dataloader is not None and self.dataloader >= loaders > 0:
            raise MisconfigurationException(
                f"dataloader={self.dataloader}, but there {'is one validation loader' if loaders == 1 else f'are {loaders}'}, "
                "counted from 0: choose another, pass dataloader=None for all, or reference= with batches"
            )

    def remember(self, batch: Any, dataloader_idx: int) -> None:
        """Keep a batch of the sanity check, the first that a validation would be collected on."""
        if self._first is None and self.uses_validation and self.dataloader in (None, dataloader_idx):
            self._first = batch

    def rehearse(self, trainer: Trainer, pl_module: LightningModule) -> "Relevance | None":
        """Score one batch and forget it, so that what would fail in an epoch fails now.

        The batch is that of the sanity check, else the first of the reference data. Where there is none (validation data without
        a sanity check), nothing happens: a loader that is asked for a batch may be another one afterwards.

        Returns:
            The batch's relevance, for checks of what is to be done with it; None without a batch.

        Raises:
            MisconfigurationException: for what would be refused later: a target that cannot be told or does not fit, a batch that
                the model does not take, units that the model does not have.
            FloatingPointError: the relevance is not finite.
        """
        relevance, failure = None, None
        batch, self._first = self._first, None
        if self.needs_data and self.reference is not None:
            with isolate_rng():
                batch = next(iter(batches_of(self.reference)), None)
            batch = None if batch is None else to_device(batch, trainer, pl_module, 0)
        if not all(gathered(trainer, batch is not None)):
            return None
        try:
            with torch.inference_mode(False), _misconfiguration(), warnings.catch_warnings():
                warnings.simplefilter("ignore", UnscoredWeightsWarning)  # one batch does not tell
                scorer = self._make_scorer(trainer, pl_module)
                scorer.update(batch)
                relevance = cast("Relevance", scorer.compute())
        except Exception as error:  # the other processes have to hear of it
            failure = error
        agree(trainer, failure)
        check_targets(gathered(trainer, None if relevance is None else relevance.target))
        return relevance

    def check_prunable(self, pl_module: LightningModule) -> None:
        """Raise now if weights that are to be pruned are not used as they are, as far as this shows without data."""
        given = {name: self.options[name] for name in ("include", "exclude", "trainable_only")}
        if self.options["granularity"] == "weight":
            with _misconfiguration(), warnings.catch_warnings():
                if getattr(rank_zero_only, "rank", 0) != 0:
                    warnings.simplefilter("ignore")
                check_prunable(pl_module, **given)

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a collection over the validation that begins."""
        self._begin(trainer, pl_module)
        total = number_of_batches(trainer, self.dataloader)
        self._progress = CollectionProgress(trainer, total=min(total, self.max_batches or total))

    def observe(self, batch: Any, dataloader_idx: int) -> None:
        """Add a validation batch, if it is one of those that are used."""
        if self._scorer is None or self._failure is not None or self.dataloader not in (None, dataloader_idx):
            return
        if self.max_batches is None or self._taken < self.max_batches:
            self._update(batch)

    def finish(self, trainer: Trainer) -> "Relevance":
        """End the collection and return what all processes together collected.

        Raises:
            MisconfigurationException: there was no batch.
            FloatingPointError: the relevance is not finite.
        """
        relevance, failure = None, self._failure
        try:
            if failure is None and self._taken == 0 and self.needs_data and self._alone:
                raise MisconfigurationException(
                    f"no batch reached method={self.method!r}: validation loader {self.dataloader} is empty or does "
                    "not exist; choose another by dataloader=, or pass reference= with batches"
                )
            if failure is None and (self._taken or not self.needs_data):
                with torch.inference_mode(False), _misconfiguration():
                    relevance = cast("Relevance", self._scorer.compute())
        except Exception as error:  # the other processes have to hear of it before it is raised
            failure = error
        finally:
            self.abandon()
        if not self._alone:
            if not self._same_everywhere:
                return self._checked(merged(trainer, relevance, failure))
            agree(trainer, failure)
            if relevance is not None and relevance.shardings and self.needs_data:
                # Sharded models are scored by all processes together, here each on the same data.
                times = trainer.world_size
                sums = {name: tensor / times for name, tensor in relevance.sums.items()}
                relevance = relevance.with_sums(sums, relevance.num_samples // times)
        if failure is not None or relevance is None:
            raise failure or MisconfigurationException(f"reference= gave method={self.method!r} no batch")
        return self._checked(relevance)

    def _checked(self, relevance: "Relevance") -> "Relevance":
        with _misconfiguration():
            check_included(self.options["include"], relevance, relevance.unscored)
        return relevance

    @property
    def _same_everywhere(self) -> bool:
        """Whether each process scores by itself what all others score: without data, or by the same reference data."""
        return self.reference is not None or not self.needs_data

    def abandon(self) -> None:
        """Forget the collection under way, if there is one."""
        self._scorer, self._failure = None, None
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def run(self, trainer: Trainer, pl_module: LightningModule) -> "Relevance":
        """Collect at once, outside of a validation: from the reference data, else from the validation's loaders."""
        self._begin(trainer, pl_module)
        try:
            if self.needs_data:
                # A loader draws from the global random generator whenever it is iterated.
                with isolate_rng():
                    self._go_through(trainer, pl_module)
        except Exception as error:  # told to the other processes at the end
            self._failure = error
        except BaseException:
            self.abandon()
            raise
        return self.finish(trainer)

    def batches(self, trainer: Trainer, pl_module: LightningModule) -> list[Any]:
        """The batches that are collected on, on the device: of the reference data, else of the validation's loaders."""
        with isolate_rng():
            if self.reference is not None:
                batches: Iterable[tuple[Any, int]] = zip(batches_of(self.reference), repeat(0), strict=False)
            else:
                trainer.fit_loop.epoch_loop.val_loop.setup_data()
                batches = validation_batches(trainer, self.dataloader)
            return [to_device(batch, trainer, pl_module, index) for batch, index in islice(batches, self.max_batches)]

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scorer = self._make_scorer(trainer, pl_module)
        self._taken, self._failure, self._alone = 0, None, trainer.world_size == 1

    def _go_through(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.reference is not None:
            batches = batches_of(self.reference)
            total = len(batches) if isinstance(batches, Sized) else float("inf")
            batches = zip(batches, repeat(0), strict=False)
        else:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            batches = validation_batches(trainer, self.dataloader)
            total = number_of_batches(trainer, self.dataloader)
        self._progress = CollectionProgress(trainer, total=min(total, self.max_batches or total))
        for batch, dataloader_idx in islice(batches, self.max_batches):
            if self._failure is not None:
                return
            self._update(to_device(batch, trainer, pl_module, dataloader_idx))

    def _update(self, batch: Any) -> None:
        try:
            with torch.inference_mode(False), _misconfiguration():
                self._scorer.update(batch)
        except Exception as error:
            if self._alone:
                raise
            self._failure = error  # the others would wait for this process: all raise at the end
            return
        self._taken += 1
        if self._progress is not None:
            self._progress.advance()

    def _make_scorer(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        given = {"target": self._inferred, **{name: value for name, value in self.options.items() if value is not None}}
        with torch.inference_mode(False), _misconfiguration():
            return scorers.scorer(
                self.method, pl_module, forward_context=trainer.precision_plugin.val_step_context, **given
            )


@contextmanager
def _misconfiguration() -> Iterator[None]:
    """Turns what the engine says about wrong arguments into Lightning's error."""
    try:
        yield
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
