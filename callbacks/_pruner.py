"""Applying masks to a model in training, and telling about it."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lrp_prune.callbacks._averages import averaged_models
from lrp_prune.callbacks._checks import misconfiguration
from lrp_prune.callbacks._corrected import inner, uncorrected
from lrp_prune.callbacks._distributed import agreeing, check_equal, gathered
from lrp_prune.callbacks._forwards import own_forward
from lrp_prune.callbacks._progress import beside
from lrp_prune.callbacks._state import PruningState
from lrp_prune.distributed.sharding import local_part, sharding_of
from lrp_prune.models.subject import subject_of
from lrp_prune.names import named_parameters, resolve
from lrp_prune.pruning import EmptiedWeightsWarning, Masks, Scope, select
from lrp_prune.pruning.compensation import Compensated, Compensation, compensate_
from lrp_prune.pruning.coverage import groups_of
from lrp_prune.pruning.existing import check_existing
from lrp_prune.pruning.kinds import figures_by_kind
from lrp_prune.pruning.masking import masked_parameters
from lrp_prune.pruning.recalibration import Recalibration, recalibrate
from lrp_prune.pruning.restoring import remembered, undone_on_error
from lrp_prune.pruning.select import check_selection
from lrp_prune.pruning.sparse_adapters import check_adapters, mask_adapters_of
from lrp_prune.pruning.zeroed import values_under
from lrp_prune.relevance import Relevance
from lrp_prune.relevance.unscored import UnscoredWeightsWarning, patterns_of
from lrp_prune.selection.scopes import check_selectable, parse_scope
from lrp_prune.training.keeping import MaskKeeper


class Pruner:
    """Selects masks by a schedule, applies them and keeps them in effect.

    Args:
        targets: the total sparsity after each round.
        scope: what is compared with what, with nothing left open.
        name: what the names of logged figures begin with.
    """

    def __init__(self, targets: list[float] | list[dict[str, float]], scope: Scope, name: str) -> None:
        self.targets, self.name = targets, name
        self._scope, self._compared = scope, scope.compared or "global"
        self.state = PruningState()
        self._keeper: MaskKeeper | None = None
        self._written: set[str] = set()
        self._told: set[str] = set()
        self._adapted: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # A copy that is made in a training keeps the masks of the model that it is given, and not of a copy of this one.
        return {**self.__dict__, "_keeper": None}

    def fits(self, model: nn.Module) -> bool:
        """Whether all that was pruned is zero in this model, as a copy of a callback finds it; warns if masks are given up.

        A copy (pickled, or by ``copy.deepcopy``) does not know any more which model it has pruned.
        """
        masks = self.state.masks
        if masks is None:
            return False
        wrong = "has other weights"
        try:
            parameters = masked_parameters(model, masks.shapes)
            if not any(bool(local_part(entry)[~masks.part(name, entry)].any()) for name, entry in parameters.items()):
                return True
            wrong = "has pruned weights that are not zero"
        except (KeyError, ValueError):
            pass
        rank_zero_warn(
            f"{self.name}: the masks of {self.state.round} earlier rounds are given up, as this model {wrong}; pruning begins "
            "anew"
        )
        return False

    @property
    def target(self) -> float | dict[str, float]:
        """The total sparsity after the coming round."""
        return self.targets[self.state.round]

    def select(self, relevance: Relevance, final: bool = False) -> Masks:
        """Masks of the coming round, or of the last one if it came now; no weight changes.

        Raises:
            MisconfigurationException: the sparsity of this round or a later one cannot be reached, or patterns match nothing.
        """
        existing, scope = self.state.masks, parse_scope(self._compared)
        with misconfiguration(), warnings.catch_warnings():
            for target in self.targets[self.state.round + 1 :]:
                groups_of(relevance, target, scope, existing)
            # Said once, by one process, and again where there is more to say.
            others = getattr(rank_zero_only, "rank", 0) != 0
            if others or self._told >= set(relevance.unscored):
                warnings.simplefilter("ignore", UnscoredWeightsWarning)
            if others:
                warnings.simplefilter("ignore", EmptiedWeightsWarning)
            target = self.targets[-1] if final else self.target
            masks = select(relevance, target, self._scope, existing=existing)
        self._told |= set(relevance.unscored)
        return masks

    def check(self, layouts: Mapping[str, str | None], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse now what a selection of weights would refuse whatever the scores are, and whatever is pruned later."""
        existing = self.state.masks
        with misconfiguration():
            for target in self.targets[self.state.round :]:
                check_selectable(layouts, shapes, target, self._compared)
                if existing is not None:  # of a checkpoint, say
                    check_existing(existing, layouts, shapes, target, self._compared)

    def check_adapters(self, pl_module: LightningModule, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse now adapters that a round could not mask."""
        with misconfiguration():
            check_adapters(pl_module, shapes)

    def check_scored(self, relevance: Relevance) -> None:
        """:meth:`check` of what is known from one batch, whose scores do not count."""
        with misconfiguration():
            for target in self.targets[self.state.round :]:
                check_selection(relevance, target, self._compared)

    def resume(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the masks so far take effect on the weights, optimizers and averages as they are now."""
        self._divide(pl_module)
        if self.state.masks is None:
            return
        with uncorrected(pl_module):
            if self._keeper is None:
                self._keeper = MaskKeeper(pl_module, self.state.masks, trainer.optimizers)
                _mask_averages(trainer, self.state.masks)
            else:
                with misconfiguration():
                    self._keeper.attach(trainer.optimizers)
            self.mask_adapters(pl_module)

    def mask_adapters(self, pl_module: LightningModule) -> None:
        """Let adapters be zero where their weights are pruned, and say once of which that is so."""
        masked = mask_adapters_of(pl_module, self.state.masks) if self.state.masks is not None else []
        if not self._adapted.issuperset(masked):
            rank_zero_info(
                f"{self.name}: the adapters of {', '.join(patterns_of(masked))} are zero where these weights are pruned, in each "
                "forward and when they are merged, at a cost (see lrp_prune.mask_adapters); exclude= leaves weights out"
            )
        self._adapted.update(masked)

    def _divide(self, pl_module: LightningModule) -> None:
        """Of masks from a checkpoint, which are whole, keep only this process's part where the weights are sharded."""
        for name in ("masks", "pending"):
            masks = getattr(self.state, name)
            if masks is not None:
                found = {entry: sharding_of(weight, entry) for entry, weight in resolve(masks, pl_module).items()}
                setattr(self.state, name, masks.divided(found))

    def recalibration(
        self, trainer: Trainer, pl_module: LightningModule, masks: Masks, batches: Callable[[], list[Any]], target: Any
    ) -> Recalibration:
        """How what these masks keep has to be scaled, from the batches of all processes together; no weight changes."""
        together, shown = trainer.world_size > 1, partial(beside, trainer)
        with (
            agreeing(trainer),
            uncorrected(pl_module),
            torch.inference_mode(False),
            own_forward(trainer, pl_module),
        ):
            return recalibrate(inner(pl_module), masks, batches(), target, together=together, progress=shown)

    def apply(
        self, trainer: Trainer, pl_module: LightningModule, masks: Masks, recalibration: Recalibration | None = None
    ) -> None:
        """Prune by these masks, scale what is kept, and count the round.

        If an error is raised where something is scaled, the weights, and averages of them, are as they were: a checkpoint that is
        written then has the round yet to come. Masks alone can be applied once more.

        Raises:
            RuntimeError: the processes of the run have different masks; no weight has changed.
        """
        check_equal(trainer, masks)
        with uncorrected(pl_module), undone_on_error() as undo:
            if recalibration is not None:
                undo += [values_under(model, masks) for model in (pl_module, *averaged_models(trainer))]
            if self._keeper is None:
                self._keeper = MaskKeeper(pl_module, masks, trainer.optimizers)
            else:
                self._keeper.update(masks)
            _mask_averages(trainer, masks)
            if recalibration is not None:
                # An average of scaled weights is the average, scaled.
                for model in (pl_module, *averaged_models(trainer)):
                    module = subject_of(inner(model)).module
                    undo.append(remembered(module, recalibration.changed(module)))
                    recalibration.apply_(module)
            self.state = PruningState(round=self.state.round + 1, masks=masks, delay=self.state.delay)
            self.mask_adapters(pl_module)

    def compensate(
        self, trainer: Trainer, pl_module: LightningModule, masks: Masks, batches: Callable[[], list[Any]], target: Any,
        compensation: Compensation,
    ) -> Compensated:  # fmt: skip
        """Prune by these masks, update what is kept by the batches of all processes together, and count the round.

        Averages of weights move by what the weights move by: the average of shifted weights is the shifted average.

        If an error is raised, the weights, and averages of them, are as they were.

        Raises:
            RuntimeError: the processes of the run have different masks; no weight has changed.
        """
        check_equal(trainer, masks)
        with uncorrected(pl_module), undone_on_error() as undo:
            model, before, averages = inner(pl_module), dict[int, Tensor](), list(averaged_models(trainer))

            def changing(parameters: Sequence[nn.Parameter]) -> None:
                undo.append(remembered(model, parameters))
                for entry in parameters if averages else ():
                    if id(entry) not in before:  # a bias may be in several stages
                        before[id(entry)] = local_part(entry).to("cpu", copy=True)

            with agreeing(trainer), torch.inference_mode(False), own_forward(trainer, pl_module):
                done = compensate_(
                    model,
                    masks,
                    batches(),
                    compensation,
                    target,
                    partial(beside, trainer),
                    changing,
                    together=trainer.world_size > 1,
                )
            changed = named_parameters(subject_of(model).module)
            changed = {name: entry for name, entry in changed.items() if id(entry) in before}
            for average in averages:
                theirs = named_parameters(subject_of(inner(average)).module)
                undo.append(remembered(average, [theirs[name] for name in changed]))
                for name, entry in changed.items():
                    _shift_(local_part(theirs[name]), before[id(entry)], local_part(entry))
            self.apply(trainer, pl_module, masks)
        return done

    def go_back(self, pl_module: LightningModule, state: PruningState) -> None:
        """Let the masks of an earlier round take effect; values and adapters that were pruned since are the caller's affair."""
        self.state = state
        if state.masks is None:
            self.release()
        else:
            assert self._keeper is not None  # later masks were kept by it
            self._keeper.update(state.masks)
            self.mask_adapters(pl_module)

    def look(self, trainer: Trainer, closely: bool = True) -> None:
        """Let pruned weights that something else than an optimizer has written to be zero again, and say once which these are.

        Averages of weights may have taken them in by then.
        """
        found = [] if self._keeper is None else self._keeper.look(closely)
        if found and self.state.masks is not None:
            _mask_averages(trainer, self.state.masks)
        if not self._written.issuperset(found):
            self._written.update(found)
            warnings.warn(
                f"{self.name}: between two steps something writes to pruned weights of {', '.join(patterns_of(found))}, such as "
                "a constraint in on_train_batch_end: they are set to zero again before each batch, validation and checkpoint "
                "(of weights alone, if a callback that does so is listed before this one); leave out what is zero",
                stacklevel=2,
            )

    def check_zeros(self, trainer: Trainer) -> None:
        """Let what is pruned be zero at the very end as well, and say of which weights something else had brought it back."""
        if self._keeper is None:
            return
        try:
            mine = self._keeper.brought_back()
        except (KeyError, ValueError) as error:
            rank_zero_warn(
                f"{self.name}: the model has other weights than in the training, and may not be pruned: {error}"
            )
            return
        names = sorted({name for theirs in gathered(trainer, mine) for name in theirs})
        if names:
            self._keeper.attach(trainer.optimizers)  # which finds weights again that were replaced
            rank_zero_warn(
                f"{self.name}: after the last step something wrote to pruned weights of {', '.join(patterns_of(names))}, such as "
                "a callback that copies averages of its own in on_train_end: they are zero again now, but not in a checkpoint "
                "that was written in between; lightning's EMAWeightAveraging is masked as the model is, and "
                "trainer.save_checkpoint after the training has the zeros"
            )

    def release(self) -> None:
        """Take off every hook; the weights keep their zeros."""
        if self._keeper is not None:
            self._keeper.remove()
            self._keeper = None

    def log_progress(self, pl_module: LightningModule) -> None:
        """Log the total sparsity, of all weights that were asked for, and the round."""
        sparsity = self.state.masks.sparsity if self.state.masks is not None else 0.0
        _log(pl_module, {f"{self.name}/sparsity": sparsity, f"{self.name}/round": float(self.state.round)})

    def log_round(self, pl_module: LightningModule, previous: Masks | None, samples: int) -> None:
        """Log the figures of the round just done: its target, what is newly pruned, the sparsity by kind of layer."""
        masks, target = self.state.masks, self.targets[self.state.round - 1]
        assert masks is not None
        newly = masks.num_pruned - (previous.num_pruned if previous is not None else 0)
        figures = {f"{self.name}/newly_pruned": float(newly), f"{self.name}/samples": float(samples)}
        if isinstance(target, float):
            figures[f"{self.name}/target"] = target
        for group, each in figures_by_kind(masks).items():
            figures[f"{self.name}/sparsity/{group.replace('*.', '')}"] = each.sparsity
        _log(pl_module, figures)


@torch.no_grad()
def _shift_(average: Tensor, before: Tensor, after: Tensor) -> None:
    """Move an average by what the values that it is of were moved by."""
    wide, device = torch.promote_types(average.dtype, torch.float32), average.device
    average.copy_(average.to(wide) + (after.to(device, wide) - before.to(device, wide)))


def _mask_averages(trainer: Trainer, masks: Masks) -> None:
    for average in averaged_models(trainer):
        masks.apply_(average)


def _log(pl_module: LightningModule, figures: Mapping[str, float]) -> None:
    # Equal on all ranks and constant over an epoch unless there were several rounds, of which the last is the largest.
    values = {name: torch.tensor(value, device=pl_module.device) for name, value in figures.items()}
    pl_module.log_dict(values, on_step=False, on_epoch=True, reduce_fx="max", sync_dist=True, batch_size=1)
