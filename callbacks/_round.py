"""What a round does: from relevance to masks, from masks to a pruned model, and the table that tells of it."""

import logging
import warnings
from collections.abc import Mapping
from functools import partial

from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lrp_prune.callbacks._callbacks import callbacks_of
from lrp_prune.callbacks._checks import check_apart, frozen_since, known_layouts
from lrp_prune.callbacks._collection import Collection
from lrp_prune.callbacks._listening import is_allowed, tell_before_round
from lrp_prune.callbacks._pruner import Pruner
from lrp_prune.callbacks._resuming import warn_of_pending, warn_of_refused
from lrp_prune.callbacks._summary import preview, round_table, show
from lrp_prune.pruning import Masks
from lrp_prune.pruning.compared import asked_of
from lrp_prune.pruning.compensation import Compensated, Compensation
from lrp_prune.pruning.recalibration import Recalibration
from lrp_prune.relevance import Relevance
from lrp_prune.relevance.unscored import patterns_of
from lrp_prune.targets import in_words

_logger = logging.getLogger("lrp_prune")
_WAY_OUT = "Freeze them after the last round, or prune frozen weights too, by naming them in include= or by trainable_only=False"


class Round:
    """Takes a collection's relevance to a pruned model; when that is to happen is the callback's affair.

    Args:
        collection: what gives relevance.
        pruner: what selects masks, applies them, and has the state that checkpoints keep.
        count: of all rounds.
        recalibrate: scale what is kept after each.
        compensation: how what is kept is updated after each; None: it is not.
        summary: print a table after each.
    """

    def __init__(
        self, collection: Collection, pruner: Pruner, count: int, recalibrate: bool, compensation: Compensation | None,
        summary: bool,
    ) -> None:  # fmt: skip
        self._collection, self._pruner, self._count = collection, pruner, count
        self._recalibrate, self._compensation, self._summary = recalibrate, compensation, summary
        self._told: list[str] = []
        self.reset()

    def reset(self) -> None:
        """Forget what another training found."""
        self.previewed: Masks | None = None
        self._claimed: set[str] = set()
        self._parameters: set[str] = set()
        self._frozen: set[str] = set()

    def check(self, trainer: Trainer, pl_module: LightningModule, preview: bool) -> None:
        """Refuse now what can be known without data."""
        scored = self._collection.check(trainer, pl_module)
        if not preview:
            self._claim(trainer, scored)
        self._collection.check_prunable(pl_module)
        if scored:
            shapes = {name: tuple(parameter.shape) for name, parameter in scored.items()}
            self._pruner.check_adapters(pl_module, shapes)
            self._pruner.check(known_layouts(pl_module, scored, self._collection.needs_data), shapes)

    def rehearse(self, trainer: Trainer, pl_module: LightningModule, preview: bool) -> None:
        """Refuse now what one batch tells, see :meth:`Collection.rehearse`.

        Args:
            trainer: the training that begins.
            pl_module: its module.
            preview: whether the round will change nothing.
        """
        self._collection.check_loader(trainer)
        asked = "recalibrate=True" if self._recalibrate else "" if self._compensation is None else "compensation"
        if asked and not preview and not self._collection.uses_validation:
            self._collection.check_batches(trainer, asked)
        relevance = self._collection.rehearse(trainer, pl_module)
        if relevance is not None:
            self._pruner.check_scored(relevance)
            if not preview:
                self._claim(trainer, relevance)

    def _claim(self, trainer: Trainer, found: Relevance | Mapping[str, Tensor]) -> None:
        """Note what these rounds prune; refuses what those of another callback prune, whose zeros would count as well as ours.

        Raises:
            MisconfigurationException: and says which, and by which callbacks.
        """
        self._claimed.update(found)
        owned = found.members.values() if isinstance(found, Relevance) else ()
        self._parameters.update({member.parameter for members in owned for member in members} or found)
        mine, others = self._pruner.name, [getattr(entry, "_round", None) for entry in callbacks_of(trainer)]
        for other in others:
            if not isinstance(other, Round) or other is self:
                continue
            if other._collection.kinds == self._collection.kinds:
                check_apart(mine, self._claimed, other._pruner.name, other._all_claimed)
            else:
                check_apart(mine, self._parameters, other._pruner.name, other._all_parameters)

    @property
    def _all_claimed(self) -> set[str]:
        """Weights, also of rounds that are done and were not looked at in this training; or modules whose units these are."""
        masks = self._pruner.state.masks if self._collection.kinds == ("weight",) else None
        return self._claimed.union(masks or ())

    @property
    def _all_parameters(self) -> set[str]:
        """Weights, or what units own of them, also of rounds that are done."""
        return self._parameters.union(self._pruner.state.masks or ())

    def pend(self, trainer: Trainer, relevance: Relevance, epoch: int, previewing: bool) -> None:
        """Select masks in a validation, to be applied when the training goes on; or show what they would be."""
        if previewing:
            self.preview(trainer, relevance)
            return
        self._claim(trainer, relevance)
        state = self._pruner.state
        state.pending = self._select(trainer.lightning_module, relevance)
        state.pending_epoch, state.pending_samples = epoch, relevance.num_samples
        state.pending_target = relevance.target

    def _select(self, pl_module: LightningModule, relevance: Relevance) -> Masks:
        """The coming round's masks; says once of which weights nothing more can be pruned, as they were frozen since."""
        weights = self._collection.kinds == ("weight",)
        candidates = self._all_claimed if weights else {*(self._pruner.state.masks or ())}
        frozen = frozen_since(pl_module, candidates - set(relevance.parameter_shapes))
        told = f"{self._pruner.name}: {', '.join(patterns_of(sorted(frozen)))} cannot be pruned any more, being frozen since"
        try:
            masks = self._pruner.select(relevance)
        except MisconfigurationException as error:
            raise (MisconfigurationException(f"{error}. {told}: {_WAY_OUT}") if frozen else error) from error
        if not self._frozen.issuperset(frozen):
            self._frozen.update(frozen)
            last = self._pruner.state.round + 1 == self._count
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                final = masks if last else self._pruner.select(relevance, final=True)
            entries = final.num_entries + sum(numel for name, numel in frozen.items() if name not in final)
            rank_zero_warn(
                f"{told}: the last round will leave {final.num_pruned / entries:.2%} of all {entries:,} weights of this callback "
                f"pruned, where {self._pruner.targets[-1]} {'' if weights else 'of the units '}was asked for. {_WAY_OUT}"
            )
        return masks

    def preview(self, trainer: Trainer, relevance: Relevance) -> None:
        """Select and show the last round's masks, and change nothing."""
        self.previewed = self._pruner.select(relevance, final=True)
        samples = relevance.num_samples if self._collection.needs_data else 0
        text = preview(self.previewed, str(self._collection.method), samples, self._explains(relevance.target))
        show(trainer, text)  # made by all processes

    def prune(self, trainer: Trainer, pl_module: LightningModule, log: bool) -> None:
        """Apply the masks that wait, or those that are collected for now, and tell of it."""
        pruner, previous = self._pruner, self._pruner.state.masks
        done = pruner.state.round
        if not is_allowed(trainer, pl_module, trains_on=log):
            pruner.state.pending = None
            if not log:
                warn_of_refused(done, self._count)
            return
        if not log:
            warn_of_pending(done)
        masks, samples, sparsity = pruner.state.pending, pruner.state.pending_samples, pruner.target
        explained = pruner.state.pending_target
        if masks is None:
            # No data are needed, or there are reference data, or the validation was left out.
            relevance = self._collection.run(trainer, pl_module)
            explained = relevance.target
            self._claim(trainer, relevance)
            masks = self._select(pl_module, relevance)
            samples = relevance.num_samples if self._collection.needs_data else 0
        tell_before_round(trainer, pl_module, masks, self._recalibrate or self._compensation is not None)
        recalibration = self._recalibration(trainer, pl_module, masks, explained) if self._recalibrate else None
        compensated = None
        if self._compensation is None:
            pruner.apply(trainer, pl_module, masks, recalibration)
        else:
            compensated = self._compensate(trainer, pl_module, masks, explained, self._compensation)
        if log:
            pruner.log_round(pl_module, previous, samples)
        if self._summary and trainer.is_global_zero:
            table = round_table(
                masks,
                previous,
                index=pruner.state.round,
                count=self._count,
                target=sparsity,
                method=str(self._collection.method),
                samples=samples,
                recalibration=recalibration,
                compensated=compensated,
                explains=self._explains(explained),
            )
            show(trainer, table)

    def _recalibration(
        self, trainer: Trainer, pl_module: LightningModule, masks: Masks, explained: str
    ) -> Recalibration:
        batches = partial(self._collection.batches, trainer, pl_module)
        target = asked_of(self._collection.method.target, explained)
        return self._pruner.recalibration(trainer, pl_module, masks, batches, target)

    def _compensate(
        self, trainer: Trainer, pl_module: LightningModule, masks: Masks, explained: str, compensation: Compensation
    ) -> Compensated:
        batches = partial(self._collection.batches, trainer, pl_module, every=True)
        target = asked_of(self._collection.method.target, explained)
        done = self._pruner.compensate(trainer, pl_module, masks, batches, target, compensation)
        if trainer.is_global_zero:
            _logger.info("%s: round %d: %s", self._pruner.name, self._pruner.state.round, done)
            for remark in done.remarks:
                if remark not in self._told:
                    _logger.warning(remark)
            self._told = done.remarks
        return done

    def _explains(self, target: str) -> str:
        return in_words(target) if self._collection.explains and target else ""
