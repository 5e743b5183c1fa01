"""Collecting relevance inside a Lightning run: from the batches of a validation, or from reference data."""

import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from functools import partial
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lrp_prune.callbacks._batches import batches_by_loader, batches_of, number_of_batches, validation_batches
from lrp_prune.callbacks._checks import (
    check_count,
    check_reference,
    check_weights,
    checked_kinds,
    checked_method,
    misconfiguration,
)
from lrp_prune.callbacks._distributed import agree, agreeing, check_targets, gathered, merged
from lrp_prune.callbacks._forwards import own_forward
from lrp_prune.callbacks._progress import CollectionProgress
from lrp_prune.models.batches import mapped
from lrp_prune.pruning import METHODS, UNIT_METHODS, Method, Scorer, scorer
from lrp_prune.pruning.checking import check_uses
from lrp_prune.pruning.coverage import refuse_unusable
from lrp_prune.pruning.methods import collected_by
from lrp_prune.pruning.recalibration import enough
from lrp_prune.relevance.unscored import UnscoredWeightsWarning, check_included
from lrp_prune.targets import Inferred
from lrp_prune.wrapper.internals import to_device

if TYPE_CHECKING:
    from lrp_prune.relevance import Relevance


MethodName = Literal["lrp", "gradient", "wanda", "magnitude", "random", "activation", "taylor", "integrated_gradients"]
# The names are spelt out for help and type checkers.
assert get_args(MethodName) == (*METHODS, *UNIT_METHODS)
_OTHERS = "reference='all', or batches"
Reference = int | Literal["all"] | Iterable[Any] | LightningDataModule


class Collection:
    """Scores a module's weights by one method, batch by batch; used by each callback that needs relevance.

    Between :meth:`start` and :meth:`finish` there is one scorer, which takes the batches given to :meth:`observe`. The
    scorer runs the model by itself and leaves modes, random state and ``.grad`` as they were.

    Args:
        method: by which.
        reference: the index of the validation loader whose batches are used, ``"all"`` for those of all; or batches, a loader or
            a data module, instead of the validation's.
        max_batches: batches used of each pass over the data.
        argument: what ``reference`` is called where it is given.
        granularity, include, exclude, trainable_only, accumulate_on: see :class:`~lrp_prune.callbacks.RelevancePruning`.

    Raises:
        MisconfigurationException: an argument has a value that is not possible.
    """

    def __init__(
        self,
        *,
        method: str | Method,
        reference: Reference,
        max_batches: int | None,
        granularity: str | Sequence[str] = "weight",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        trainable_only: bool = False,
        accumulate_on: str | None = None,
        argument: str = "reference",
    ) -> None:
        self.method = checked_method(method)
        self.kinds = checked_kinds(granularity)
        with misconfiguration():
            collected_by(self.method, self.kinds)
        check_weights(include, exclude, trainable_only, accumulate_on)
        check_count("max_batches", max_batches, 1, optional=True)
        check_reference(reference, argument)
        self._argument = argument
        self.max_batches = max_batches
        self.loader: int | None = reference if isinstance(reference, int) else None
        self.data: Iterable[Any] | LightningDataModule | None = None if isinstance(reference, int | str) else reference
        self.which: dict[str, Any] = {"include": include, "exclude": exclude, "trainable_only": trainable_only}
        self.running: dict[str, Any] = {"accumulate_on": accumulate_on}
        self._inferred = Inferred()  # once for all rounds
        self._scorer: Scorer | None = None
        self._progress: CollectionProgress | None = None
        self._taken = 0
        self._alone = True
        self._failure: Exception | None = None
        self._first: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # What is under way is about this model and this run.
        return {**self.__dict__, "_scorer": None, "_progress": None, "_failure": None}

    @property
    def needs_data(self) -> bool:
        """Whether the method looks at data at all."""
        return self.method.needs_data(self.kinds)

    @property
    def explains(self) -> bool:
        """Whether the method explains a value that the model computes."""
        return self.method.explains(self.kinds)

    @property
    def uses_validation(self) -> bool:
        """Whether the data are the validation's batches: there are no reference data, and the method needs some."""
        return self.data is None and self.needs_data

    @property
    def active(self) -> bool:
        """Whether a collection is under way."""
        return self._scorer is not None

    def check(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, torch.Tensor]:
        """Raise now what can be known without data: patterns that match nothing, a module that cannot be run.

        Returns:
            The weights that will be scored, by name; nothing where units are.
        """
        scores = self._make_scorer(trainer, pl_module)
        return scores.parameters if self.kinds == ("weight",) else {}

    def check_loader(self, trainer: Trainer) -> None:
        """Raise now if there is no such validation loader."""
        if self.uses_validation:
            self._check_index(trainer)

    def _check_index(self, trainer: Trainer) -> None:
        loaders = len(batches_by_loader(trainer))
        if self.loader is not None and self.loader >= loaders > 0:
            raise MisconfigurationException(
                f"{self._argument}={self.loader}, but there {'is one validation loader' if loaders == 1 else f'are {loaders}'}, "
                f"counted from 0: choose another, or pass {'batches' if self._argument != 'reference' else _OTHERS}"
            )

    def remember(self, batch: Any, dataloader_idx: int) -> None:
        """Keep a batch of the sanity check, the first that a validation would be collected on."""
        if self._first is None and self.uses_validation and self.loader in (None, dataloader_idx):
            self._first = batch

    def rehearse(self, trainer: Trainer, pl_module: LightningModule) -> "Relevance | None":
        """Score one batch and forget it, so that what would fail in an epoch fails now; without data if none are needed.

        The batch is that of the sanity check, else the first of the reference data. Where there is none (validation data without
        a sanity check), nothing happens: a loader that is asked for a batch may be another one afterwards.

        Returns:
            The batch's relevance, for checks of what is to be done with it; None without a batch.

        Raises:
            MisconfigurationException: for what would be refused later: a target that cannot be told or does not fit, a batch that
                the model does not take, units that the model does not have.
            FloatingPointError: the relevance is not finite.
        """
        batch, self._first = self._first, None
        if self.needs_data and self.data is not None:
            with isolate_rng():
                batch = next(iter(batches_of(self.data)), None)
            batch = None if batch is None else to_device(batch, trainer, pl_module, 0)
        if self.needs_data and not all(gathered(trainer, batch is not None)):
            return None
        with agreeing(trainer), torch.inference_mode(False), misconfiguration(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UnscoredWeightsWarning)  # one batch does not tell
            scores = self._make_scorer(trainer, pl_module)
            if self.needs_data:
                scores.update(batch)
            relevance = scores.compute()
        check_targets(gathered(trainer, relevance.target))
        return relevance

    def check_prunable(self, pl_module: LightningModule) -> None:
        """Raise now if weights that are to be pruned are not used as they are, as far as this shows without data."""
        if self.kinds == ("weight",):
            with misconfiguration():
                refuse_unusable(check_uses(pl_module, **self.which))

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a collection over the validation that begins."""
        self._begin(trainer, pl_module)
        total = number_of_batches(trainer, self.loader)
        self._progress = CollectionProgress(trainer, total=min(total, self.max_batches or total))

    def observe(self, batch: Any, dataloader_idx: int) -> None:
        """Add a validation batch, if it is one of those that are used."""
        if self._scorer is None or self._failure is not None or self.loader not in (None, dataloader_idx):
            return
        if self.max_batches is None or self._taken < self.max_batches:
            self._update(batch)

    def finish(self, trainer: Trainer) -> "Relevance":
        """End the collection and return what all processes together collected.

        Raises:
            MisconfigurationException: there was no batch.
            FloatingPointError: the relevance is not finite.
        """
        relevance, failure, scores = None, self._failure, self._scorer
        assert scores is not None
        try:
            if failure is None and self._taken == 0 and self.needs_data and self._alone:
                raise MisconfigurationException(
                    f"no batch reached method {self.method}: validation loader {self.loader} is empty or does "
                    f"not exist; choose another by {self._argument}=, or pass batches as {self._argument}="
                )
            if failure is None and (self._taken or not self.needs_data):
                with torch.inference_mode(False), misconfiguration():
                    relevance = scores.collected()
        except Exception as error:  # the other processes have to hear of it before it is raised
            failure = error
        finally:
            self.abandon()
        if not self._alone:
            if not self._same_everywhere:
                return self._scored(scores, merged(trainer, relevance, failure))
            agree(trainer, failure)
            if relevance is not None and relevance.shardings and self.needs_data:
                # Sharded models are scored by all processes together, here each on the same data.
                times = trainer.world_size
                sums = {name: tensor / times for name, tensor in relevance.sums.items()}
                relevance = relevance.with_sums(sums, relevance.num_samples // times)
        if failure is not None or relevance is None:
            raise failure or MisconfigurationException(f"{self._argument}= gave method {self.method} no batch")
        return self._scored(scores, relevance)

    def _scored(self, scores: Scorer, collected: "Relevance") -> "Relevance":
        with torch.inference_mode(False), misconfiguration():
            relevance = scores.scored(collected)
            check_included(self.which["include"], relevance, relevance.unscored)
        return relevance

    @property
    def _same_everywhere(self) -> bool:
        """Whether each process scores by itself what all others score: without data, or by the same reference data."""
        return self.data is not None or not self.needs_data

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

    def batches(self, trainer: Trainer, pl_module: LightningModule, every: bool = False) -> list[Any]:
        """The first of the batches that are collected on, as many as a recalibration looks at, on the device.

        They are of the reference data, else of the validation's loaders; what is beyond is neither read nor moved.

        Args:
            trainer: the run.
            pl_module: its module.
            every: all that are collected on, and in the host's memory, as they are of any number.
        """
        with isolate_rng():
            if self.data is not None:
                batches: Iterable[tuple[Any, int]] = zip(batches_of(self.data), repeat(0), strict=False)
            else:
                trainer.fit_loop.epoch_loop.val_loop.setup_data()
                batches = validation_batches(trainer, self.loader)
            taken = islice(batches, self.max_batches)
            moved = (to_device(batch, trainer, pl_module, index) for batch, index in taken)
            return [mapped(batch, Tensor.cpu) for batch in moved] if every else enough(moved)

    def check_batches(self, trainer: Trainer, what: str) -> None:
        """Raise now if there will be no :meth:`batches`: a method that needs no data does not ask for any.

        Args:
            trainer: the training that begins.
            what: needs them.
        """
        if self.data is None and not trainer.enable_validation:
            raise MisconfigurationException(
                f"{what} needs batches: a validation loader (with a validation_step, and limit_val_batches > 0), or reference="
            )
        if self.data is None:
            self._check_index(trainer)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scorer = self._make_scorer(trainer, pl_module)
        self._taken, self._failure, self._alone = 0, None, trainer.world_size == 1

    def _go_through(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.data is not None:
            batches = batches_of(self.data)
            total = len(batches) if isinstance(batches, Sized) else float("inf")
            batches = zip(batches, repeat(0), strict=False)
        else:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            batches = validation_batches(trainer, self.loader)
            total = number_of_batches(trainer, self.loader)
        self._progress = CollectionProgress(trainer, total=min(total, self.max_batches or total))
        for batch, dataloader_idx in islice(batches, self.max_batches):
            if self._failure is not None:
                return
            self._update(to_device(batch, trainer, pl_module, dataloader_idx))

    def _update(self, batch: Any) -> None:
        try:
            with torch.inference_mode(False), misconfiguration():
                assert self._scorer is not None
                self._scorer.update(batch)
        except Exception as error:
            if self._alone:
                raise
            self._failure = error  # the others would wait for this process: all raise at the end
            return
        self._taken += 1
        if self._progress is not None:
            self._progress.advance()

    def _make_scorer(self, trainer: Trainer, pl_module: LightningModule) -> Scorer:
        method = self.method if self.method.target is not None else self.method.with_target(self._inferred)
        context = partial(own_forward, trainer, pl_module)
        with torch.inference_mode(False), misconfiguration():
            return scorer(
                method, pl_module, granularity=self.kinds, forward_context=context, **self.which, **self.running
            )
