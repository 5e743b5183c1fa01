"""The callback that trains a pruned model towards what it gave before it was pruned."""

import functools
import weakref
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lrp_prune.callbacks import _checks
from lrp_prune.callbacks._callbacks import callbacks_of, copied_state
from lrp_prune.callbacks._calls import Seen, outermost, watching
from lrp_prune.callbacks._corrected import inner
from lrp_prune.callbacks._listening import RoundListener
from lrp_prune.callbacks._strategies import check_strategy
from lrp_prune.callbacks.relevance_pruning import RelevancePruning
from lrp_prune.models.outputs import logits_in
from lrp_prune.models.states import eager, undisturbed, unlogged
from lrp_prune.models.subject import forwarded
from lrp_prune.names import class_name, resolve, unwrap
from lrp_prune.pruning import Masks
from lrp_prune.pruning.sparse_adapters import whole_adapters
from lrp_prune.relevance.unscored import patterns_of
from lrp_prune.training.earlier import EarlierValues
from lrp_prune.training.matching import soft_divergence, squared_distance

_LOGGED = "distillation/divergence"


class Distillation(RoundListener):
    r"""Adds to the loss of any training how far the pruned model is from what it was before it was pruned.

    .. math:: L = (1 - a) \, L_{\text{training step}} + a \, T^2 \, \mathrm{KL}(p^{\text{teacher}}_T \,\|\, p_T)

    with :math:`p_T` the softmax of the logits over the temperature :math:`T` (Hinton et al., arXiv 1503.02531), :math:`a` the
    ``share``. Before the first round of :class:`RelevancePruning` the training is what it is without this callback; right before
    it the teacher is fixed, and from then on each step runs the teacher on what the step called the model with: one more
    forward, without gradients, in evaluation mode, in the step's precision. The student's outputs are those of the step itself.

    What happens in which hook:

    - ``setup``, ``on_train_start``: strategy, manual optimization and compiled LightningModules are refused by name.
    - ``on_train_batch_start`` to ``on_train_batch_end``: ``training_step`` of this instance is wrapped; in between, nothing of
      the module is changed. So gradient accumulation, clipping, precision and DDP work as they do without it.
    - right before a round prunes: the teacher's values are kept. They are in the checkpoint, so that a resumed training equals
      the uninterrupted one.

    ``distillation/divergence`` is on the logger by epoch: :math:`T^2 \mathrm{KL}`, or the squared distance.

    Example::

        from lrp_prune.callbacks import Distillation, RelevancePruning, Rounds

        Trainer(max_epochs=6, callbacks=[RelevancePruning(0.8, Rounds(2, every_n_epochs=2)), Distillation()])

    Args:
        share: of the loss that is the teacher's, in (0, 1]; 1 does without the training step's loss, and so without labels: it
            may be None, or not a number.
        temperature: above 0; larger values show more of what the teacher takes for second best. Not for ``match="values"``.
        teacher: None for the model as it was right before the first round: a copy of the weights that are trained, and of what is
            pruned of those that are not (beside LoRA that is little more than the pruned values; what is unfrozen later is added
            then). Or another module that is
            called as the trained one is, in a training with or without rounds of pruning.
        match: ``"logits"``, the divergence of choices, whose classes are the last dimension (of images the second); or
            ``"values"``, the mean squared difference of the outputs, for regressions and several labels at once.
        module: name, in the ``LightningModule``, of the module whose outputs are matched; None: the outermost that gives any.
        allow_untested: try other strategies than those that it is tested with.

    Raises:
        MisconfigurationException: an argument has an impossible value; there is no teacher; or the training step makes no call of
            the model whose outputs could be matched.
    """

    def __init__(
        self,
        share: float = 0.5,
        temperature: float = 2.0,
        *,
        teacher: nn.Module | None = None,
        match: Literal["logits", "values"] = "logits",
        module: str | None = None,
        allow_untested: bool = False,
    ) -> None:
        _checks.check_flags(allow_untested=allow_untested)
        _check_number("share", share, "in (0, 1]", lambda value: 0 < value <= 1)
        _check_number("temperature", temperature, "above 0", lambda value: 0 < value < float("inf"))
        _checks.check_choice("match", match, ("logits", "values"), optional=False)
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise MisconfigurationException(
                f"teacher must be a module, or None for the model before the first round, got {teacher!r}"
            )
        if module is not None and (not isinstance(module, str) or not module):
            raise MisconfigurationException(f"module must be None or the name of a module, got {module!r}")
        self.share, self.temperature, self.teacher, self.match = share, temperature, teacher, match
        self._name, self._allow_untested = module, allow_untested
        self._earlier: EarlierValues | None = None
        self._module: weakref.ref[LightningModule] | None = None
        self._unwrap: Callable[[], None] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_strategy(trainer, type(self).__name__, self._allow_untested)
        prunings = [entry for entry in callbacks_of(trainer) if isinstance(entry, RelevancePruning)]
        if not prunings and self.teacher is None:
            raise MisconfigurationException(
                "Distillation learns from the model before the first round of RelevancePruning, which is none of the trainer's "
                "callbacks: add it, or pass the dense model as teacher="
            )
        known = self._module() if self._module is not None else None
        if known is not pl_module:  # what another model was is no teacher of this one
            self._earlier = None
        self._module = weakref.ref(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = class_name(pl_module)
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{name} optimizes manually, so that there is no loss of a training step to add to: distil in its "
                "training_step, or leave Distillation out"
            )
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            raise MisconfigurationException(
                f"{name} was compiled as a whole, so that what its training_step calls cannot be seen: compile the model that "
                "it holds (self.model = torch.compile(self.model)) before it is given to the trainer"
            )
        self._watched(pl_module)
        pruned = any(entry.round for entry in callbacks_of(trainer) if isinstance(entry, RelevancePruning))
        if pruned and self._earlier is None and self.teacher is None:
            raise MisconfigurationException(
                "the model is pruned already and this callback has no state, so that the model before the first round is not "
                "known: go on from a checkpoint of a training with Distillation, or pass the dense model as teacher="
            )
        if self.teacher is not None:
            trained = {name for name, entry in pl_module.named_parameters() if entry.requires_grad}
            self._check_apart(pl_module, trained, "are trained")
            self.teacher.to(pl_module.device)

    @override
    def before_round(self, trainer: Trainer, pl_module: LightningModule, masks: Masks, adjusts: bool) -> None:
        if self.teacher is not None:
            pruned = {id(entry) for entry in resolve(masks, pl_module).values()}
            names = {name for name, entry in pl_module.named_parameters() if id(entry) in pruned}
            return self._check_apart(pl_module, names, "are going to be pruned")
        if self._earlier is None:
            self._earlier = EarlierValues(pl_module, ())
        self._earlier.keep_whole(pl_module, self._changing(pl_module, adjusts))
        self._earlier.remember(pl_module, masks)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._detach()
        self._attach(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._detach()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"earlier": self._earlier.state_dict() if self._earlier is not None else None}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        earlier = state_dict["earlier"]
        self._earlier = EarlierValues.from_state_dict(earlier) if earlier is not None else None

    def __getstate__(self) -> dict[str, Any]:
        # Strategies that spawn processes pickle the callback.
        return copied_state(self, "_module", "_unwrap")

    def _check_apart(self, pl_module: LightningModule, changing: Set[str], why: str) -> None:
        """Refuse a teacher that changes with its student, from which it would never be apart."""
        assert self.teacher is not None
        taught = {entry.untyped_storage().data_ptr() for entry in self.teacher.parameters()}
        shared = [
            name
            for name, entry in pl_module.named_parameters()
            if name in changing and entry.untyped_storage().data_ptr() in taught and entry.numel()
        ]
        if shared:
            raise MisconfigurationException(
                f"teacher= shares {', '.join(patterns_of(shared))} with the module, which {why}: it would move with its "
                "student: pass a copy that stays as it is (copy.deepcopy(model)), or leave teacher= out for the model before the "
                "first round"
            )

    def _changing(self, pl_module: LightningModule, adjusts: bool) -> list[str]:
        """What of the model will not stay as it is now."""
        parameters, buffers = dict(pl_module.named_parameters()), dict(pl_module.named_buffers())
        names = [name for name, entry in parameters.items() if entry.requires_grad or adjusts]
        return [name for name in (*names, *buffers) if {**parameters, **buffers}[name].is_floating_point()]

    def _watched(self, pl_module: LightningModule) -> list[nn.Module]:
        """The modules whose calls are seen: from the LightningModule to the model inside, whichever the step calls."""
        root = inner(pl_module)
        if self._name is not None:
            try:
                return [root.get_submodule(self._name)]
            except AttributeError as error:
                raise MisconfigurationException(
                    f"Distillation(module={self._name!r}): {class_name(root)} has no such module"
                ) from error
        if self.teacher is not None:  # called as the whole model is
            try:
                return [forwarded(root)]
            except ValueError as error:
                raise MisconfigurationException(f"{error}. Or pass module= with the name of the model") from error
        children = [child for child in root.children() if next(child.parameters(), None) is not None]
        return list({id(entry): entry for entry in (root, *children, *map(unwrap, children))}.values())

    def _attach(self, pl_module: LightningModule) -> None:
        if self._earlier is None and self.teacher is None:
            return  # nothing is pruned yet
        module: Any = inner(pl_module)
        own = vars(module).get("training_step")
        step = module.training_step

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            if self.teacher is None and self._earlier is not None:  # of what was unfrozen since
                self._earlier.keep_whole(pl_module, self._changing(pl_module, adjusts=False))
            with watching(self._watched(pl_module)) as calls:
                output = step(*args, **kwargs)
            return self._with_divergence(pl_module, output, outermost(calls))

        def unwrap_step() -> None:
            if own is None:
                del module.training_step
            else:
                module.training_step = own

        module.training_step, self._unwrap = training_step, unwrap_step

    def _detach(self) -> None:
        if self._unwrap is not None:
            self._unwrap()
            self._unwrap = None

    def _with_divergence(self, pl_module: LightningModule, output: Any, calls: list[Seen]) -> Any:
        """What a training step gave, with the teacher's part in its loss."""
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor) and (self.share < 1 or not calls):
            return output  # the step is skipped
        if not calls:
            raise MisconfigurationException(
                "the training step has called no module whose outputs Distillation could match "
                f"({', '.join(class_name(entry) for entry in self._watched(pl_module))} were looked at): pass module= with the "
                "name of the one that gives logits"
            )
        divergence = torch.stack([self._divergence(pl_module, call) for call in calls]).mean()
        samples = len(calls[0].logits) if calls[0].logits is not None else 1
        pl_module.log(_LOGGED, divergence.detach(), on_step=False, on_epoch=True, sync_dist=True, batch_size=samples)
        if self.share < 1 and isinstance(loss, Tensor):  # without labels there is none, or one that is not a number
            divergence = (1 - self.share) * loss + self.share * divergence.to(loss.dtype)
        return {**output, "loss": divergence} if isinstance(output, dict) else divergence

    def _divergence(self, pl_module: LightningModule, call: Seen) -> Tensor:
        student, counted = call.logits, call.counted()
        assert student is not None
        with (
            torch.no_grad(),
            self._teaching(pl_module, call.module) as teacher,
            undisturbed(teacher),
            unlogged(pl_module),
            eager(teacher),
        ):
            teaches = logits_in(teacher(*call.args, **call.kwargs))
        try:
            if teaches is None:
                raise ValueError(f"the teacher, a {class_name(teacher)}, gives no logits")
            if self.match == "values":
                return squared_distance(student, teaches, counted)
            return soft_divergence(student, teaches, self.temperature, counted)
        except ValueError as error:
            raise MisconfigurationException(f"{class_name(call.module)} cannot be distilled: {error}") from error

    @contextmanager
    def _teaching(self, pl_module: LightningModule, module: nn.Module) -> Iterator[nn.Module]:
        """The module that teaches, for a while."""
        if self.teacher is not None:
            yield self.teacher
            return
        assert self._earlier is not None
        with whole_adapters(pl_module), self._earlier.standing_in(pl_module):
            yield module


def _check_number(name: str, value: Any, what: str, allowed: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not allowed(value):
        raise MisconfigurationException(f"{name} must be a number {what}, got {value!r}")
