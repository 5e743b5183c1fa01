"""The callback that prunes a model in rounds while it trains."""

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from typing_extensions import override

from lrp_prune.attribution.composites import Composite
from lrp_prune.callbacks import _checks, _guard, _resuming
from lrp_prune.callbacks._collecting import CollectingCallback
from lrp_prune.callbacks._collection import Collection
from lrp_prune.callbacks._pruner import Pruner
from lrp_prune.callbacks._rounds import Rounds
from lrp_prune.callbacks._state import PruningState
from lrp_prune.callbacks._summary import round_table, show
from lrp_prune.pruning import Masks, Schedule
from lrp_prune.relevance import Relevance, granularities_of
from lrp_prune.targets import in_words


class RelevancePruning(CollectingCallback):
    """Prunes a model during an ordinary training, in rounds, by what its weights contribute.

    A round collects relevance in a validation, decides there what to prune, and prunes at the start of the next
    training epoch (or batch), so that no checkpoint holds pruned weights under a metric measured before. Until the next
    round the training goes on as usual: fine-tuning is yours. Sparsity is always total sparsity, and what is pruned
    stays pruned.

    What happens in which hook:

    - ``setup``: the strategy is checked, that no other pruning callback logs under the same name, and that Lightning's own
      ``ModelPruning`` is none of the callbacks.
    - ``on_sanity_check_start`` or ``on_train_start``, whichever is first: it is checked that patterns match, that the scope
      fits, and that the weights to prune are used as they are; after a resume the masks take effect again.
    - ``on_train_start``: it is checked that all rounds fit into the training; and one batch, of the sanity check or the
      reference data, is scored and forgotten, so that a target that cannot be told, or a batch that the model does not take, is
      refused now and not after an epoch. Without a sanity check the validation's loaders are left alone.
    - ``on_validation_batch_end`` of the validations that a round needs, not of the sanity check: the batch's relevance
      is added up. ``on_validation_epoch_end``: masks are selected, and are pending. They are part of the checkpoint.
    - ``on_train_epoch_start``, ``on_train_batch_start``: pending masks are applied, a table is printed.
    - ``on_train_epoch_end``, ``on_validation_epoch_end``: ``pruning/sparsity`` and ``pruning/round`` are logged. The
      sparsity is of all weights that were asked for, the same for every method (see
      :func:`~lrp_prune.attribution.candidates.candidates`); what could not be scored is named in the table and in one warning.
    - ``on_fit_end``: masks that are still pending are applied, with a warning.

    Magnitude and random scores need no data, and with ``reference`` the data are at hand: such rounds need no
    validation and score the weights right before they are pruned.

    By default all weights are ranked together by relevance and contribution, each divided by its tensor's mean, so that what
    matters least anywhere goes first. No tensor is pruned below half of the average density, so that no layer is emptied which
    a saturated output hardly depends on.

    Several of these callbacks may work in one training, on different weights, each with a ``name`` of its own.

    The zeros are kept by :class:`~lrp_prune.pruning.keeping.MaskKeeper`. Parameters keep their names, so the
    checkpoint's state dict is that of the plain model.

    Example::

        from lightning.pytorch import Trainer
        from lrp_prune.callbacks import RelevancePruning

        pruning = RelevancePruning(sparsity=0.7, rounds=5, schedule="cubic")
        trainer = Trainer(max_epochs=6, callbacks=[pruning])
        trainer.fit(module, train_loader, validation_loader)
        pruning.masks.save("masks.safetensors")

    Args:
        sparsity: total sparsity after the last round in [0, 1), or one for each name pattern.
        rounds: number of rounds.
        schedule: total sparsity by round: ``"one_shot"``, ``"linear"``, ``"cubic"``, ``"exponential"``, a list of
            ``rounds`` numbers, or a callable from the round (from 1) to a number.
        every_n_epochs: epochs between rounds; 1 if neither this nor ``every_n_steps`` is given.
        every_n_steps: optimizer steps (``trainer.global_step``) between rounds, instead of epochs.
        start_epoch: the epoch at whose start the first round prunes. 0 needs ``reference``, or a method without data.
        start_step: the step from which the first round is due; ``None`` for ``every_n_steps``.
        method: ``"lrp"``, ``"wanda"``, ``"gradient"``, ``"magnitude"`` or ``"random"``.
        composite, statistic, granularity, target, include, exclude, max_batches, dataloader, reference, seed,
            trainable_only, accumulate_on, allow_untested: see :class:`~lrp_prune.callbacks.RelevanceCollector`;
            ``None`` leaves the choice to the method.
        scope: what is compared with what: ``"global"``, ``"layer"``, ``"row"``, ``"column"`` or ``"N:M"``; ``None`` for
            the method's best.
        ranking: ``"absolute"`` or ``"ascending"``: what is smallest is pruned.
        normalize: by what each tensor is divided before it is compared: ``"mean"``, ``"sum"``, ``"max"``, ``None`` for
            nothing; ``"auto"`` for the method's best.
        floor: with scope ``"global"``, the share that each tensor keeps of the average density, see
            :func:`lrp_prune.select`; ``None`` for the best, 0.5: no tensor is pruned below half of the average density, so
            that a ranking by relevance cannot empty a layer that a saturated output hardly depends on.
        recalibrate: after each round, before the training goes on, scale what is kept, channel by channel, to the outputs from
            before the round, as far as that helps (see :func:`lrp_prune.pruning.recalibrate`): forward passes over the batches
            that relevance was collected on, which are read once more. Off by default: where training goes on, it makes no
            difference that could be measured.
        guard: name of a metric logged in ``validation_step``; ``<name>/<guard>`` equals it once all rounds are done
            and is worse than any value before, for ``ModelCheckpoint`` and ``EarlyStopping`` to monitor.
        guard_mode: ``"min"`` if a smaller value of that metric is better, else ``"max"``.
        summary: print a table after each round.
        preview: change nothing, and show what would be pruned: from what the first round collects it is selected at the sparsity
            of the last one, :meth:`lrp_prune.Masks.report` is printed, :attr:`previewed` has the masks, and the training goes on
            dense, bit for bit as without this callback. Only the first round's collection has to fit into the training.
        name: what the names of everything that it logs begin with, in place of ``pruning``; also tells its state in a checkpoint
            from that of other pruning callbacks.

    Raises:
        MisconfigurationException: an argument has an impossible value, or does not fit another.
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] = 0.5,
        rounds: int = 1,
        schedule: Schedule = "cubic",
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        start_epoch: int = 1,
        start_step: int | None = None,
        method: str = "lrp",
        composite: str | Composite | dict[str, str] | None = None,
        statistic: str | None = None,
        scope: str | None = None,
        ranking: str = "absolute",
        normalize: str | None = "auto",
        floor: float | None = None,
        recalibrate: bool = False,
        granularity: str | list[str] = "weight",
        target: Any = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        max_batches: int | None = None,
        dataloader: int | None = 0,
        reference: Iterable[Any] | LightningDataModule | None = None,
        seed: int = 0,
        trainable_only: bool = True,
        accumulate_on: str | None = None,
        guard: str | None = None,
        guard_mode: str = "min",
        summary: bool = True,
        preview: bool = False,
        allow_untested: bool = False,
        name: str = "pruning",
    ) -> None:
        if not isinstance(name, str) or not name or "/" in name:
            raise MisconfigurationException(f"name must be a word that metrics' names can begin with, got {name!r}")
        self.name = name
        targets = _checks.check_selection(sparsity, rounds, schedule, scope, ranking, normalize)
        self._collection = Collection(
            method=method,
            composite=composite,
            statistic=statistic,
            granularity=granularity,
            target=target,
            include=include,
            exclude=exclude,
            seed=seed,
            trainable_only=trainable_only,
            accumulate_on=accumulate_on,
            max_batches=max_batches,
            dataloader=dataloader,
            reference=reference,
        )
        self._rounds = self._planned = Rounds.from_arguments(
            rounds, every_n_epochs, every_n_steps, start_epoch, start_step, self._collection.uses_validation
        )
        _checks.check_choice("guard_mode", guard_mode, ("min", "max"), optional=False)
        selection = _checks.selection_of(method, granularity, scope, ranking, normalize, floor)
        self._pruner = Pruner(targets, selection, name)
        self._guard, self._guard_mode = guard, guard_mode
        _checks.check_flag("preview", preview)
        self._summary, self._preview, self._recalibrate = summary, preview, recalibrate
        self._previewed: Masks | None = None
        self._allow_untested = allow_untested
        kinds = ",".join(granularities_of(granularity))
        self._identity = {"granularity": kinds, "include": include, "exclude": exclude}
        if name != "pruning":
            self._identity["name"] = name
        self._fingerprint = {
            "total sparsities": str(targets),
            "rounds": str(self._rounds),
            "method": method,
            **{name: str(value) for name, value in selection.items()},
        }
        self._module: weakref.ref[LightningModule] | None = None
        self._checked = self._restored = self._warned = False
        self._logged: list[str] = []
        self._explained = ""

    @property
    def masks(self) -> Masks | None:
        """The masks in effect: what is pruned now; ``None`` before the first round."""
        return self._pruner.state.masks

    @property
    def previewed(self) -> Masks | None:
        """What ``preview=True`` found that would be pruned; ``None`` before it did, and without it."""
        return self._previewed

    @property
    def round(self) -> int:
        """Rounds that are done."""
        return self._pruner.state.round

    @property
    @override
    def state_key(self) -> str:
        way_out = "give each a name, as in RelevancePruning(..., name='attention')"
        return _checks.checked_key(self, self._generate_state_key(**self._identity), way_out)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._pruner.state.to_dict(self._fingerprint)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pruner.state = PruningState.from_dict(state_dict, self._fingerprint)
        self._rounds = self._planned.delayed(self._pruner.state.delay)
        self._restored = True

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _checks.check_strategy(trainer, type(self).__name__, self._allow_untested, sharded=True)
        if stage != "fit":
            return
        _checks.check_other_pruning(trainer, type(self).__name__)
        if any(other is not self and other.name == self.name for other in _all_in(trainer)):
            raise MisconfigurationException(
                f"several RelevancePruning callbacks would log {self.name}/sparsity, each of other weights: give each a name, as "
                "in RelevancePruning(..., name='attention')"
            )
        known = self._module() if self._module is not None else None
        if known is not pl_module:  # what was pruned in another model says nothing about this one
            self._pruner.state = PruningState()
            self._rounds = self._planned
        self._pruner.state.pending_epoch = -1  # this trainer may count its epochs anew; a checkpoint overrides it
        self._module = weakref.ref(pl_module)
        self._checked = self._restored = False
        self._previewed = None
        self._logged = []

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_sanity_check_start(trainer, pl_module)
        self._begin(trainer, pl_module)

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged = list(trainer.callback_metrics)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._begin(trainer, pl_module)
        _resuming.warn_of_losses(trainer, pl_module)
        if trainer.ckpt_path and trainer.global_step > 0 and not self._restored:
            self._begin_late(trainer)
        self._rehearse(trainer, pl_module)
        self._make_up(trainer, pl_module)
        if self._guard is not None:
            _guard.check_sanity(self._guard, self._logged)
        if self._preview:
            self._rounds.check_validations(trainer, self._collection.uses_validation)
            return
        done = self.round + (self._pruner.state.pending is not None)
        self._rounds.check_fit(trainer, done, self._collection.uses_validation)
        if done < self._rounds.count:
            _checks.warn_unguarded_monitors(trainer, [callback.name for callback in (self, *_all_in(trainer))])

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        in_training = trainer.state.fn == "fit" and not trainer.sanity_checking
        if not in_training or not self._collects or not self._collection.uses_validation:
            return
        if self._rounds.needs_validation(trainer, self.round):
            self._collection.start(trainer, pl_module)

    @override
    def _uses_validation(self, trainer: Trainer) -> bool:
        return trainer.state.fn == "fit" and self._collection.uses_validation and self._collects

    @override
    def _remember(self, batch: Any, dataloader_idx: int) -> None:
        if self._collects:
            self._collection.remember(batch, dataloader_idx)

    @override
    def _observe(self, batch: Any, dataloader_idx: int) -> None:
        self._collection.observe(batch, dataloader_idx)

    @override
    def _end_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self._collection.active:
            self._pend(trainer, self._collection.finish(trainer), trainer.current_epoch)
        self._log_progress(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pruner.resume(trainer, pl_module)  # parameters and optimizers may have been replaced since
        self._prune_if_due(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # After a resume within an epoch there was no on_train_epoch_start.
        self._prune_if_due(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_progress(trainer, pl_module)
        if self._guard is not None:
            _guard.check_logged(trainer, self._guard, [callback.name for callback in _all_in(trainer)])

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_train_end, where ModelCheckpoint may still write the last metrics' checkpoint.
        if self._preview:
            if self._previewed is None and self.round < self._rounds.count:
                rank_zero_warn("the training ended before the first round had collected: there is no preview")
        elif self._pruner.state.pending is not None:
            rank_zero_warn(
                f"the training ended after round {self.round + 1} had collected and before it could prune: its masks "
                "are applied now, with no training after them and in no checkpoint written so far"
            )
            self._prune(trainer, pl_module, log=False)
        elif self.round < self._rounds.count and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(f"the training ended after {self.round} of {self._rounds.count} pruning rounds")

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._warned:
            self._warned = _resuming.warn_within_window(trainer)

    @property
    def _collects(self) -> bool:
        """Whether there still is a round to collect for, or the one that is previewed."""
        return self.round < self._rounds.count and self._previewed is None

    @override
    def _abandon(self) -> None:
        self._collection.abandon()
        self._pruner.release()

    def __getstate__(self) -> dict[str, Any]:
        # Strategies that spawn processes pickle the callback; a weak reference cannot go along.
        return {**self.__dict__, "_module": None}

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The first hooks at which every strategy has restored weights, optimizers and this callback's state.
        self._pruner.resume(trainer, pl_module)
        if self.round < self._rounds.count and not self._checked:
            scored = self._collection.check(trainer, pl_module)
            self._collection.check_prunable(pl_module)
            if scored:
                shapes = {name: tuple(parameter.shape) for name, parameter in scored.items()}
                self._pruner.check(_checks.layouts_of(pl_module, scored, self._collection.needs_data), shapes)
            self._checked = True

    def _rehearse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.round < self._rounds.count:
            self._collection.check_loader(trainer)
            relevance = self._collection.rehearse(trainer, pl_module)
            if relevance is not None:
                self._pruner.check_scored(relevance)

    def _begin_late(self, trainer: Trainer) -> None:
        delay = self._rounds.missed(trainer, self._collection.uses_validation) if self.round == 0 else 0
        self._pruner.state.delay, self._rounds = delay, self._rounds.delayed(delay)
        unit = "steps" if self._rounds.by_steps else "epochs"
        named = ", ".join(f"{name}={value!r}" for name, value in self._identity.items())
        rank_zero_warn(
            f"{trainer.ckpt_path} was written without RelevancePruning({named}), so that no masks are known from it: "
            f"pruning begins with round {self.round + 1} of {self._rounds.count}, and "
            f"{f'all rounds are delayed by {delay} {unit}' if delay else 'its rounds keep their times'}"
        )

    def _make_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The uninterrupted training collected in this validation; the weights are still those that it saw.
        epoch = _resuming.skipped_validation(trainer)
        needed = epoch is not None and self._rounds.needs_validation(trainer, self.round, epoch)
        if epoch is not None and needed and self._collection.uses_validation:
            self._pend(trainer, self._collection.run(trainer, pl_module), epoch)

    def _pend(self, trainer: Trainer, relevance: Relevance, epoch: int) -> None:
        if self._preview:
            self._show_preview(trainer, relevance)
            return
        state = self._pruner.state
        self._explained = relevance.target
        state.pending = self._pruner.select(relevance)
        state.pending_epoch, state.pending_samples = epoch, relevance.num_samples

    def _prune_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = self._pruner.state
        if not self._collects or not self._rounds.is_due(trainer, state.round):
            return
        if state.pending is None and self._rounds.by_steps and self._collection.uses_validation:
            return  # the next validation collects
        if not self._rounds.by_steps and trainer.current_epoch <= state.pending_epoch:
            return  # collected in this epoch, whose end may write a checkpoint under the metric of that validation
        if self._preview:
            self._show_preview(trainer, self._collection.run(trainer, pl_module))
        else:
            self._prune(trainer, pl_module, log=True)

    def _show_preview(self, trainer: Trainer, relevance: Relevance) -> None:
        self._previewed = self._pruner.select(relevance, final=True)
        data = f" on {relevance.num_samples:,} samples" if self._collection.needs_data else ""
        explained = f"\nexplains: {in_words(relevance.target)}" if self._collection.explains else ""
        head = f"Preview of pruning by {self._collection.method}{data}: no weight is changed{explained}"
        report = self._previewed.report()  # by all processes
        show(trainer, f"{head}\n{report}")

    def _prune(self, trainer: Trainer, pl_module: LightningModule, log: bool) -> None:
        pruner, previous = self._pruner, self.masks
        masks, samples, target = pruner.state.pending, pruner.state.pending_samples, pruner.target
        if masks is None:
            # No data are needed, or there are reference data, or the validation was left out.
            relevance = self._collection.run(trainer, pl_module)
            self._explained = relevance.target
            masks = pruner.select(relevance)
            samples = relevance.num_samples if self._collection.needs_data else 0
        recalibration = None
        if self._recalibrate:
            asked = self._collection.options["target"]
            batches = partial(self._collection.batches, trainer, pl_module)
            explained = asked if callable(asked) else self._explained
            recalibration = pruner.recalibration(trainer, pl_module, masks, batches, explained)
        pruner.apply(trainer, pl_module, masks, recalibration)
        if log:
            pruner.log_round(pl_module, previous, samples)
        if self._summary and trainer.is_global_zero:
            table = round_table(
                masks,
                previous,
                index=self.round,
                count=self._rounds.count,
                target=target,
                method=self._collection.method,
                samples=samples,
                recalibration=recalibration,
                explains=in_words(self._explained) if self._collection.explains else "",
            )
            show(trainer, table)

    def _log_progress(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pruner.log_progress(pl_module)
        if self._guard is not None:
            final = self.round == self._rounds.count
            _guard.log_guarded(trainer, pl_module, self._guard, self._guard_mode, final, self.name)


def _all_in(trainer: Trainer) -> list[RelevancePruning]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's callback connector
    return [callback for callback in callbacks if isinstance(callback, RelevancePruning)]
