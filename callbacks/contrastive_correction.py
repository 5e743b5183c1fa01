"""The callback that finds what causes a behaviour, and hands the correction to the model."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lrp_prune.callbacks._batches import Source
from lrp_prune.callbacks._checks import (
    check_choice,
    check_flags,
    checked_key,
    misconfiguration,
)
from lrp_prune.callbacks._collecting import CollectingCallback, check_validation
from lrp_prune.callbacks._contrast import (
    check_removal,
    checked_amount,
    checked_guard,
    checked_suite,
    enabled_entries,
    examined,
    general_measures,
    measured,
    metrics_of,
    searched,
    values_of,
    with_limits,
)
from lrp_prune.callbacks._corrected import inner
from lrp_prune.callbacks._reference_sets import ReferenceSets
from lrp_prune.callbacks._strategies import check_strategy
from lrp_prune.correction import Automatic, Guard, Learned, Patch, Search, patch_of, search_amount
from lrp_prune.correction.several import General
from lrp_prune.effects import SideEffects
from lrp_prune.engine.unsharding import make_ordinary
from lrp_prune.pruning import Method
from lrp_prune.pruning.scope import Normalization
from lrp_prune.relevance import NORMALIZATIONS, Granularity, Relevance
from lrp_prune.wrapper.module import CorrectedModule


class ContrastiveCorrection(CollectingCallback):
    """Finds the weights or units that serve an undesired behaviour and not the general one, and makes a patch of them.

    In the first validation after the sanity check the relevance of two reference sets is collected side by side, each
    from a validation loader of its own (or from data that are passed); at its end :attr:`patch` is made. A
    :class:`~lrp_prune.CorrectedModule` gets it under the name of the behaviour: at the end of ``trainer.validate``, and
    in ``fit`` at the start of the next training epoch (or its end), so that no checkpoint holds it under metrics that
    were measured before; :attr:`patch` then has the values that its entries have been trained to since. Any other module
    stays as it is, for ``callback.patch.apply_(model)``.

    With metrics given, their values before and after are logged as ``correction/undesired`` and ``correction/general``
    (``..._before``), and ``correction/entries`` always. A metric is a function of the model that returns a number, or
    the name of a metric that the validation logs: then the effect is seen in the validations that follow. Functions get
    the model in evaluation mode, without gradients; random numbers that they draw do not change those of the training.

    With ``amount="auto"`` amounts are tried, and the smallest is taken that halves the undesired metric at a loss of at most 1 %
    of the general one, of each if there are several (:class:`~lrp_prune.correction.Automatic` says what else, strengths too);
    :attr:`search` has all trials, their frontier and the reason. Metrics must be functions for that.

    With a ``suite`` the patch is measured on it, without and with, beside random weights: the table is logged, is in
    :attr:`side_effects` and in the patch's description. A patch that makes anything worse than the suite's
    limits allow is not applied, and a warning names what and by how much.

    On several processes each calls the metrics at the same time, and the mean of what they return counts; each measures the
    suite, and what the first finds counts. Where ``ModelParallelStrategy`` has sharded the model, each must run it as often. The
    patch is the same in all of them.

    Example::

        corrected = CorrectedModule(model)
        correction = ContrastiveCorrection(behaviour="repetition", general=0, undesired=1, amount=0.0003)
        Trainer(callbacks=[correction]).validate(corrected, [general_loader, undesired_loader])
        correction.patch.save("repetition.safetensors")

    Args:
        general: the set of wanted behaviour: index of a validation loader, or batches that can be iterated over again; or several
            of these by name, which count alike and of which any spares what matters to it.
        undesired: the set that shows the undesired behaviour; likewise.
        behaviour: its name.
        amount: fraction or number of weights (or units) to remove; ``"auto"`` to try some, or
            :class:`~lrp_prune.correction.Automatic`, which says how.
        strength: at which the patch is enabled.
        method: ``"lrp"`` or ``"gradient"``, or an object that says more; its ``statistic`` is ``"signed"`` where it leaves that
            open. As ``target``, a logit difference at the tokens that show the behaviour serves best.
        undesired_target: what is explained on the undesired set, if it is something else:
            :class:`~lrp_prune.targets.RepetitionMargin` or :class:`~lrp_prune.targets.TokenMargin` say.
        granularity: see :func:`lrp_prune.attribute`.
        include, exclude: patterns of the parameters or modules to choose from, and to leave alone.
        max_batches: batches used of each set.
        accumulate_on: device of the accumulators; ``None`` for the weights' own.
        normalize, reverse: see :class:`lrp_prune.correction.Contrast`.
        guard: the share of entries that may be removed at all, see :class:`lrp_prune.correction.Contrast`; or
            :class:`~lrp_prune.correction.Guard`, which also says by which statistic, and in which scope.
        undesired_metric: measures the behaviour; lower is better.
        general_metric: measures what is to stay; functions by name, or a :class:`~lrp_prune.metrics.Suite`, each with its limit.
        condition: where the patch is to act, if not everywhere: ``Learned("model.layers.8")`` says where to look. It is learned
            of hidden states of the same sets at their labelled tokens (in the undesired set those that should not be said, -100
            elsewhere), and only weights that run later are chosen; not for models that are sharded.
        suite: what the patch is tested on, with its limits: the half that nothing was chosen by.
        allow_untested: use it with strategies that it is not tested with.

    Raises:
        MisconfigurationException: an argument has an impossible value, or a reference set is empty.
    """

    def __init__(
        self,
        general: Source | dict[str, Source] = 0,
        undesired: Source = 1,
        *,
        behaviour: str = "undesired",
        amount: float | int | Literal["auto"] | Automatic = 0.0003,
        strength: float = 1.0,
        method: Literal["lrp", "gradient"] | Method = "lrp",
        undesired_target: Any = None,
        granularity: Granularity = "weight",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        max_batches: int | None = None,
        accumulate_on: str | None = None,
        normalize: Normalization | None = "total",
        guard: float | Guard | None = 0.7,
        reverse: bool = False,
        undesired_metric: Callable[[nn.Module], float] | str | None = None,
        general_metric: Callable[[nn.Module], float] | str | Mapping[str, Any] | None = None,
        condition: Learned | None = None,
        suite: Mapping[str, Any] | None = None,
        allow_untested: bool = False,
    ) -> None:
        check_removal(behaviour, strength)
        self._automatic = checked_amount(amount)
        check_choice("normalize", normalize, NORMALIZATIONS)
        self._metrics = metrics_of(undesired_metric, general_metric, amount if self._automatic else None)
        self._automatic = with_limits(self._automatic, general_metric, self._metrics)
        check_flags(reverse=reverse, allow_untested=allow_untested)
        self._guard = checked_guard(guard)
        self._sets = ReferenceSets(
            general,
            undesired,
            method=method,
            undesired_target=undesired_target,
            guard=self._guard,
            reverse=reverse,
            max_batches=max_batches,
            condition=condition,
            granularity=granularity,
            include=include,
            exclude=exclude,
            accumulate_on=accumulate_on,
        )
        self._contrast = {"normalize": normalize, "reverse": reverse}
        self._behaviour, self._amount, self._strength = behaviour, amount, strength
        self._suite = checked_suite(suite)
        self._before: dict[str, float] = {}
        self._allow_untested = allow_untested
        self._patch: Patch | None = None
        self._waiting = False
        self.search: Search | None = None
        """What an automatic amount tried and found."""
        self.side_effects: SideEffects | None = None
        """What the patch does besides, if there is a suite."""
        self.general: General | None = None
        """The relevance of the general set; by name, if several were named."""
        self.undesired: Relevance | None = None
        """The relevance of the undesired set."""

    @property
    def patch(self) -> Patch:
        """The correction.

        Raises:
            RuntimeError: there was no validation yet, or no amount was acceptable to the search.
        """
        if self._patch is None:
            raise RuntimeError(
                "no patch was made yet: run trainer.validate or trainer.fit with both reference sets"
                if self.search is None
                else "no amount reached the reduction within the limits: see .search.curve"
            )
        return self._patch

    @property
    @override
    def state_key(self) -> str:
        key = self._generate_state_key(behaviour=self._behaviour)
        return checked_key(
            self, key, "give each a behaviour of its own, as in ContrastiveCorrection(behaviour='toxicity')"
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        patch = None if self._patch is None else self._patch.state_dict()
        plain = {"waiting": self._waiting, "strength": self._strength, "before": self._before}
        return {"version": 1, "patch": patch, **plain}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("version") != 1:
            raise ValueError(f"the state has version {state_dict.get('version')!r}, this lrp-prune reads 1")
        patch = state_dict["patch"]
        self._patch = None if patch is None else patch_of(patch)
        self._waiting, self._before = state_dict["waiting"], dict(state_dict["before"])
        self._strength = state_dict.get("strength", self._strength)  # a search may have chosen another
        found = None if self._patch is None else self._patch.provenance.get("side_effects")
        self.side_effects = None if found is None else SideEffects.from_dict(found)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_strategy(trainer, type(self).__name__, self._allow_untested, sharded=self._sets.sharded)
        if self._due(trainer):
            self._sets.check(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._due(trainer):
            check_validation(trainer, type(self).__name__, "makes its patch")
            self._sets.rehearse(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if self._due(trainer):
            if torch.is_inference_mode_enabled():
                make_ordinary(pl_module)  # before the first forward, which makes what sharded weights are gathered into
            self._sets.start(trainer, pl_module)

    @override
    def _uses_validation(self, trainer: Trainer) -> bool:
        return self._patch is None and self.search is None and self._sets.uses_validation

    @override
    def _remember(self, batch: Any, dataloader_idx: int) -> None:
        self._sets.remember(batch, dataloader_idx)

    @override
    def _observe(self, batch: Any, dataloader_idx: int) -> None:
        self._sets.observe(batch, dataloader_idx)

    @override
    def _end_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._due(trainer):
            self.general, self.undesired, guard_by = self._sets.finish(trainer, pl_module)
            self._make(pl_module, guard_by)
            if self._patch is not None:
                self._waiting = self._examine(pl_module, self._patch)
                pl_module.log("correction/entries", float(self._patch.num_entries), batch_size=1)
                self._measure(pl_module, "_before", searched(self.search))
                if trainer.state.fn != "fit":
                    self._hand_over(pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hand_over(pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hand_over(pl_module, log=False)

    @override
    def _abandon(self) -> None:
        self._sets.abandon()

    def _due(self, trainer: Trainer) -> bool:
        return not trainer.sanity_checking and self._patch is None and self.search is None

    def _examine(self, pl_module: LightningModule, patch: Patch) -> bool:
        """Whether a patch is to be applied; one whose examination fails is not."""
        patch.provenance["strength"] = self._strength
        if self._suite is None:
            return True
        self.side_effects, within = examined(pl_module.trainer, patch, inner(pl_module), self._suite, self._strength)
        return within

    def _make(self, pl_module: LightningModule, guard_by: General | None) -> None:
        model = inner(pl_module)
        assert self.general is not None and self.undesired is not None
        general, undesired = self.general, self.undesired
        spared = enabled_entries(pl_module) if undesired.granularity == "weight" else {}
        where = self._sets.conditioned

        def make(amount: float | int) -> Patch:
            options: dict[str, Any] = {
                **self._contrast,
                "guard": None if self._guard is None else replace(self._guard, by=guard_by),
                "behaviour": self._behaviour,
                "spared": spared,
                "include": None if where is None else where.reached(undesired),
            }
            patch = Patch.from_contrast(model, general, undesired, amount, **options)
            return patch if where is None else where.patch(patch)

        with misconfiguration():
            if self._automatic is None:
                assert isinstance(self._amount, int | float)
                self._patch = make(self._amount)
            else:
                self.search = search_amount(
                    model,
                    make,
                    partial(measured, pl_module.trainer, "undesired", self._metrics["undesired"]),
                    general_measures(pl_module.trainer, self._metrics),
                    automatic=self._automatic,
                    strength=self._strength,
                )
                self._patch = self.search.patch
                if self.search.chosen is not None:
                    self._strength = self.search.chosen.strength
                rank_zero_info(f"Search for the smallest correction of {self._behaviour!r}:\n{self.search}")
        if self._patch is None:
            assert self.search is not None
            rank_zero_warn(
                f"nothing is corrected, see .search.curve: of {self._behaviour!r} {self.search.reason}; try other amounts, "
                "strengths, guard, target or granularity"
            )

    def _hand_over(self, pl_module: LightningModule, log: bool = True) -> None:
        if not self._waiting or self._patch is None:
            return
        self._waiting = False
        if not isinstance(pl_module, CorrectedModule):
            return
        # Validations within an epoch are followed by further steps of it.
        with pl_module.uncorrected():
            self._patch = self._patch.renewed(pl_module.module)
        try:
            # The checksums are those of a moment ago.
            pl_module.add(self._behaviour, self._patch, self._strength, strict=False)
        except ValueError as error:
            rank_zero_warn(f"the patch of {self._behaviour!r} was found and is in .patch, but is not applied: {error}")
            return
        if log:
            # A training may have changed the model since.
            chosen = None if self.search is None or pl_module.trainer.state.fn == "fit" else self.search.chosen
            self._measure(pl_module, "", searched(chosen))

    def _measure(self, pl_module: LightningModule, suffix: str, known: Mapping[str, float] | None = None) -> None:
        metrics = {name: metric for name, metric in self._metrics.items() if suffix or callable(metric)}
        for name, value in values_of(pl_module.trainer, inner(pl_module), metrics, known or {}).items():
            self._before.setdefault(name, value)
            pl_module.log(f"correction/{name}{suffix}", value, on_step=False, on_epoch=True, batch_size=1)
