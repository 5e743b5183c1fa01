"""The callback that prunes a model in rounds while it trains."""

import weakref
from collections.abc import Callable
from typing import Any, Literal

from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lrp_prune.callbacks import _checks, _monitor, _resuming, _strategies
from lrp_prune.callbacks._adapter_masking import AdapterMasking
from lrp_prune.callbacks._callbacks import copied_state
from lrp_prune.callbacks._collecting import CollectingCallback
from lrp_prune.callbacks._collection import Collection, MethodName, Reference
from lrp_prune.callbacks._pruner import Pruner
from lrp_prune.callbacks._round import Round
from lrp_prune.callbacks._rounds import Rounds
from lrp_prune.callbacks._state import PruningState
from lrp_prune.pruning import Compensation, Masks, Method, Scope
from lrp_prune.pruning.schedules import ScheduleName
from lrp_prune.relevance import Granularity


class RelevancePruning(AdapterMasking, CollectingCallback):
    """Prunes a model during an ordinary training, in rounds, by what its weights contribute.

    A round collects relevance in a validation, decides there what to prune, and prunes at the start of the next
    training epoch (or batch), so that no checkpoint holds pruned weights under a metric measured before. Until the next
    round the training goes on as usual: fine-tuning is yours. Sparsity is always total sparsity, and what is pruned
    stays pruned.

    What happens in which hook:

    - ``setup``: the strategy is checked (also whether ``compensation`` goes with it), that no other pruning callback logs under
      the same name, and that Lightning's own ``ModelPruning`` is none of the callbacks.
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
    The zeros are kept by :class:`~lrp_prune.training.keeping.MaskKeeper`. Parameters keep their names.

    Example::

        pruning = RelevancePruning(sparsity=0.7, rounds=5)
        trainer = Trainer(max_epochs=6, callbacks=[pruning])
        trainer.fit(module, train_loader, validation_loader)
        pruning.masks.save("masks.safetensors")

    Args:
        sparsity: total sparsity after the last round in [0, 1), or one for each name pattern (a budget, say). Of units it is
            their share, and that of weights, which is logged, differs from it: they own unequal numbers, and share some.
        rounds: number of rounds, one an epoch from epoch 1 on; or :class:`Rounds`, which also says when they are. None: one, or
            one for each number of a list as ``schedule``.
        schedule: total sparsity by round, see :func:`lrp_prune.pruning.sparsity_schedule`; a list ends at ``sparsity``.
        method: ``"lrp"``, ``"wanda"``, ``"gradient"``, ``"magnitude"`` or ``"random"``, of units also ``"activation"``,
            ``"taylor"`` or ``"integrated_gradients"``; or an object that says more, such as
            ``LRP(composite="attnlrp", target="class")``; see :mod:`lrp_prune.pruning.methods`.
        scope: what is compared with what: ``"global"``, ``"layer"``, ``"row"``, ``"column"`` or ``"N:M"``; or a
            :class:`lrp_prune.Scope`, which also has the floor, the order and the normalization; ``None`` for the method's best.
        granularity, include, exclude, reference, max_batches, accumulate_on, allow_untested: see
            :class:`~lrp_prune.callbacks.RelevanceCollector`.
        trainable_only: prune only weights that require gradients, and those that ``include`` names.
        recalibrate: after each round, before the training goes on, scale what is kept, channel by channel, to the outputs from
            before the round, as far as that helps (see :func:`lrp_prune.pruning.recalibrate`): forward passes over the batches
            that relevance was collected on, which are read once more. Off by default: training makes up for it.
        compensation: after each round, before the training goes on, update all that is kept in place of scaling it, to the least
            squares of what each layer gave right before the round, as it was trained until then (see
            :func:`lrp_prune.prune`): ``"exact"``, ``"obs"``, or an object such as :class:`lrp_prune.pruning.LeastSquares`. It
            takes some forward passes a layer over all batches that relevance was collected on (``max_batches`` limits them),
            which are read once more. Optimizer states stay as they are.
        monitor: name of a metric logged in validation; ``<name>/<monitor>`` equals it once all rounds are done
            and is worse than any value before, for ``ModelCheckpoint`` and ``EarlyStopping`` to monitor.
        monitor_mode: ``"min"`` if a smaller value of that metric is better, else ``"max"``.
        summary: print a table after each round.
        preview: change nothing, and show what would be pruned: from what the first round collects it is selected at the sparsity
            of the last one, :meth:`lrp_prune.Masks.report` is printed, :attr:`previewed` has the masks, and the training goes on
            dense, bit for bit as without this callback. Only the first round's collection has to fit into the training.
        name: what the names of everything that it logs begin with; also tells its state in a checkpoint from that of other
            pruning callbacks, of which several may work in one training, on different weights.

    Raises:
        MisconfigurationException: an argument has an impossible value, or does not fit another.
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] = 0.5,
        rounds: int | Rounds | None = None,
        *,
        schedule: ScheduleName | list[float] | Callable[[int], float] = "cubic",
        method: MethodName | Method = "lrp",
        scope: str | Scope | None = None,
        granularity: Granularity | list[Granularity] = "weight",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        trainable_only: bool = True,
        reference: Reference = 0,
        max_batches: int | None = None,
        accumulate_on: str | None = None,
        recalibrate: bool = False,
        compensation: Literal["exact", "obs"] | Compensation | None = None,
        monitor: str | None = None,
        monitor_mode: Literal["min", "max"] = "min",
        summary: bool = True,
        preview: bool = False,
        name: str = "pruning",
        allow_untested: bool = False,
    ) -> None:
        _checks.check_logging(name, monitor, monitor_mode)
        _checks.check_flags(recalibrate=recalibrate, summary=summary, preview=preview, allow_untested=allow_untested)
        self.name = name
        self._collection = collection = Collection(
            method=method,
            granularity=granularity,
            include=include,
            exclude=exclude,
            trainable_only=trainable_only,
            reference=reference,
            max_batches=max_batches,
            accumulate_on=accumulate_on,
        )
        planned = rounds if isinstance(rounds, Rounds) else Rounds(rounds)
        self._times = self._planned = planned.times(schedule, collection.uses_validation)
        compensation = _checks.checked_compensation(compensation, recalibrate)
        scope = _checks.checked_scope(scope, collection.method, collection.kinds)
        targets = _checks.check_schedule(sparsity, self._times.count, schedule, scope)
        self._pruner = Pruner(targets, scope, name)
        self._round = Round(collection, self._pruner, self._times.count, recalibrate, compensation, summary)
        self._monitored, self._preview = _monitor.Monitored(monitor, monitor_mode, name), preview
        self._compensates, self._allow_untested = compensation is not None and not preview, allow_untested
        self._identity = {"granularity": ",".join(collection.kinds), "include": include, "exclude": exclude}
        self._identity |= {"name": name} if name != "pruning" else {}
        described = {"total sparsities": targets, "rounds": self._times, "method": collection.method, "scope": scope}
        self._fingerprint = {what: str(value) for what, value in described.items()}
        self._module: weakref.ref[LightningModule] | None = None
        self._checked = self._restored = self._warned = False
        self._logged: list[str] = []

    @property
    def masks(self) -> Masks | None:
        """The masks in effect: what is pruned now; ``None`` before the first round."""
        return self._pruner.state.masks

    @property
    def previewed(self) -> Masks | None:
        """What ``preview=True`` found that would be pruned; ``None`` before it did, and without it."""
        return self._round.previewed

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
        self._pruner.state = PruningState.from_dict(state_dict, self._fingerprint, self._planned.count)
        self._times = self._planned.delayed(self._pruner.state.delay)
        self._restored = True

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _strategies.check_strategy(trainer, type(self).__name__, self._allow_untested, sharded=True)
        if stage != "fit":
            return
        if self._compensates:
            _strategies.check_compensated_strategy(trainer)
        _checks.check_other_pruning(trainer, type(self).__name__)
        _checks.check_names(_checks.names_of(trainer, RelevancePruning))
        self._monitored.check(trainer)
        known, self._module = self._module, weakref.ref(pl_module)
        if not (self._pruner.fits(pl_module) if known is None else known() is pl_module):
            self._pruner.state = PruningState()
            self._times = self._planned
        self._pruner.state.pending_epoch = -1  # this trainer may count its epochs anew; a checkpoint overrides it
        self._checked, self._restored, self._logged = False, False, []
        self._round.reset()

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
        if self.round < self._times.count:
            self._round.rehearse(trainer, pl_module, self._preview)
        self._make_up(trainer, pl_module)
        _monitor.check_sanity(self._monitored.metric, self._logged)
        if self._preview:
            self._times.check_validations(trainer, self._collection.uses_validation)
            return
        done = self.round + (self._pruner.state.pending is not None)
        self._times.check_fit(trainer, done, self._collection.uses_validation)
        if done < self._times.count:
            _checks.warn_monitors(trainer, [self.name, *_checks.names_of(trainer, RelevancePruning)])

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._monitored.forget(trainer)
        self._pruner.look(trainer)
        collects = self._uses_validation(trainer) and not trainer.sanity_checking
        if collects and self._times.needs_validation(trainer, self.round):
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
            self._round.pend(trainer, self._collection.finish(trainer), trainer.current_epoch, self._preview)
        self._log_progress(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._monitored.catch_up(trainer, self, self.round >= self._times.count)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pruner.resume(trainer, pl_module)  # parameters and optimizers may have been replaced since
        self._prune_if_due(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._pruner.look(trainer)
        # After a resume within an epoch there was no on_train_epoch_start.
        self._prune_if_due(trainer, pl_module)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._pruner.look(trainer, closely=False)  # a checkpoint of weights alone asks no callback

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_progress(trainer, pl_module)
        _monitor.check_logged(trainer, self._monitored.metric, _checks.names_of(trainer, RelevancePruning))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_train_end, where ModelCheckpoint may still write the last metrics' checkpoint.
        self._pruner.check_zeros(trainer)
        if self._preview:
            if self.previewed is None and self.round < self._times.count:
                rank_zero_warn("the training ended before the first round had collected: there is no preview")
        elif self._pruner.state.pending is not None:
            self._prune(trainer, pl_module, log=False)
        elif self.round < self._times.count and not getattr(trainer, "fast_dev_run", False):
            rank_zero_warn(f"the training ended after {self.round} of {self._times.count} pruning rounds")

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pruner.look(trainer)
        self._warned = self._warned or _resuming.warn_within_window(trainer)

    @property
    def _collects(self) -> bool:
        """Whether there still is a round to collect for, or the one that is previewed."""
        return self.round < self._times.count and self.previewed is None

    @override
    def _abandon(self) -> None:
        self._collection.abandon()
        self._pruner.release()

    def __getstate__(self) -> dict[str, Any]:
        return copied_state(self, "_module")

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The first hooks at which every strategy has restored weights, optimizers and this callback's state.
        self._pruner.resume(trainer, pl_module)
        if self.round < self._times.count and not self._checked:
            self._round.check(trainer, pl_module, self._preview)
            self._checked = True

    def _begin_late(self, trainer: Trainer) -> None:
        delay = self._times.missed(trainer, self._collection.uses_validation) if self.round == 0 else 0
        self._pruner.state.delay, self._times = delay, self._times.delayed(delay)
        named = ", ".join(f"{name}={value!r}" for name, value in self._identity.items())
        _resuming.warn_of_late_begin(trainer, f"RelevancePruning({named})", self._times, self.round, delay)

    def _make_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The uninterrupted training collected in this validation; the weights are still those that it saw.
        epoch = _resuming.skipped_validation(trainer)
        uses = self._collection.uses_validation
        if epoch is not None and uses and self._times.needs_validation(trainer, self.round, epoch):
            self._round.pend(trainer, self._collection.run(trainer, pl_module), epoch, self._preview)

    def _prune_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = self._pruner.state
        if not self._collects or not self._times.is_due(trainer, state.round):
            return
        if state.pending is None and self._times.by_steps and self._collection.uses_validation:
            return  # the next validation collects
        if not self._times.by_steps and trainer.current_epoch <= state.pending_epoch:
            return  # collected in this epoch, whose end may write a checkpoint under the metric of that validation
        if self._preview:
            self._round.preview(trainer, self._collection.run(trainer, pl_module))
        else:
            self._prune(trainer, pl_module, log=True)

    def _prune(self, trainer: Trainer, pl_module: LightningModule, log: bool) -> None:
        self._round.prune(trainer, pl_module, log)
        self._monitored.forget(trainer)  # it was measured on the model from before

    def _log_progress(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pruner.log_progress(pl_module)
        self._monitored.log(trainer, pl_module, self.round >= self._times.count)
