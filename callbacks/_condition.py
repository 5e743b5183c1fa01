"""What a condition is learned of inside a Lightning run: hidden states of the reference sets, taken beside their relevance."""

from collections.abc import Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lrp_prune.callbacks._batches import Source, batches_of
from lrp_prune.callbacks._checks import misconfiguration
from lrp_prune.callbacks._corrected import inner
from lrp_prune.callbacks._distributed import agreeing, gathered
from lrp_prune.callbacks._forwards import own_forward
from lrp_prune.correction import ActivationAbove, Learned, Patch
from lrp_prune.correction.conditional import ConditionalPatch
from lrp_prune.correction.conditions.activation import UNDESIRED
from lrp_prune.correction.conditions.states import joined, module_at, states_in
from lrp_prune.correction.gating import later_parameters, within_reach
from lrp_prune.models.subject import subject_of
from lrp_prune.relevance import Relevance
from lrp_prune.wrapper.internals import to_device


class Conditioned:
    """A condition that was learned, and the parameters that it can act on."""

    def __init__(self, condition: ActivationAbove, later: list[str]) -> None:
        self.condition, self._later = condition, set(later)

    def reached(self, relevance: Relevance) -> list[str]:
        """The tensors of a relevance to choose from."""
        return within_reach(relevance, self._later, self.condition.at)

    def patch(self, patch: Patch) -> ConditionalPatch:
        """The patch under the condition."""
        return ConditionalPatch(patch, self.condition)


class ConditionSets:
    """Takes hidden states at the labelled tokens of reference sets, in one validation, and learns a condition of them.

    Args:
        learned: which module is looked at, and how.
        general: index of a validation loader, or batches, by name.
        undesired: likewise.
        max_batches: of each set.

    Raises:
        MisconfigurationException: the argument is no such object, or a general set has the name of the undesired one.
    """

    def __init__(
        self, learned: Learned, general: Mapping[str, Source], undesired: Source, max_batches: int | None
    ) -> None:
        if not isinstance(learned, Learned):
            raise MisconfigurationException(
                f"condition must be a Learned, which says where to look, as Learned('model.layers.8'), or None, got {learned!r}"
            )
        if UNDESIRED in general:
            raise MisconfigurationException(f"with a condition no general set can be called {UNDESIRED!r}: rename it")
        self._learned, self._max = learned, max_batches
        self._sets: dict[str, Source] = {UNDESIRED: undesired, **general}
        self._model: nn.Module | None = None
        self._first: dict[str, Any] = {}
        self._forget()

    def _forget(self) -> None:
        self._states: dict[str, list[Tensor]] = {name: [] for name in self._sets}
        self._taken = dict.fromkeys(self._sets, 0)
        self._later: list[str] | None = None
        self._failure: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_context": None}  # what is under way is about this run

    def check(self, pl_module: LightningModule) -> None:
        """Raise now if there is no such module."""
        with misconfiguration((ValueError, KeyError)):
            module_at(subject_of(inner(pl_module)).module, self._learned.at)

    def remember(self, batch: Any, dataloader_idx: int) -> None:
        """Keep the first batch of each set that the sanity check has."""
        for name, source in self._sets.items():
            if isinstance(source, int) and source == dataloader_idx:
                self._first.setdefault(name, batch)

    def rehearse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the states of a first batch of each set, where there is one, so that what would fail in an epoch fails now."""
        first, self._first = self._first, {}
        self.start(trainer, pl_module)
        with agreeing(trainer):
            for name, source in self._sets.items():
                if not isinstance(source, int):
                    with isolate_rng():
                        batch = next(iter(batches_of(source)), None)
                    first |= {} if batch is None else {name: to_device(batch, trainer, pl_module, 0)}
            for name, batch in first.items():
                self._add(name, batch)
            if self._failure is not None:
                raise self._failure
        self.abandon()

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the validation that begins."""
        self._forget()
        self._model, self._context = subject_of(inner(pl_module)).module, partial(own_forward, trainer, pl_module)

    def observe(self, batch: Any, dataloader_idx: int) -> None:
        """Take the states of a validation batch for the sets that it belongs to."""
        for name, source in self._sets.items():
            if isinstance(source, int) and source == dataloader_idx:
                self._add(name, batch)

    def _add(self, name: str, batch: Any) -> None:
        if self._model is None or self._failure is not None or self._taken[name] == self._max:
            return
        try:
            with torch.inference_mode(False), misconfiguration((ValueError, KeyError)), self._context():
                self._states[name].append(states_in(self._model, self._learned.at, batch, name))
                if name == UNDESIRED and self._later is None:
                    self._later = later_parameters(self._model, self._learned.at, batch)
        except Exception as error:  # told to the other processes at the end
            self._failure = error
        self._taken[name] += 1

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> Conditioned:
        """The condition, the same in all processes.

        Raises:
            MisconfigurationException: a batch has no labels, a set none at all, or nothing parts the sets.
        """
        if self._model is None:
            self.start(trainer, pl_module)
        try:
            with agreeing(trainer), isolate_rng():
                for name, source in self._sets.items():
                    if not isinstance(source, int):
                        for batch in islice(batches_of(source), self._max):
                            self._add(name, to_device(batch, trainer, pl_module, 0))
                if self._failure is not None:
                    raise self._failure
            states, later = self._states, self._later
        finally:
            self.abandon()
        everyone = gathered(trainer, ({name: torch.cat(found) for name, found in states.items() if found}, later))
        with misconfiguration():
            together = {
                # Each process has its share of a validation loader, and all of any other data.
                name: joined(
                    [
                        found[name]
                        for found, _ in (everyone if isinstance(source, int) else everyone[:1])
                        if name in found
                    ],
                    name,
                )
                for name, source in self._sets.items()
            }
            condition = self._learned.between(together.pop(UNDESIRED), together)
        return Conditioned(condition, next(names for _, names in everyone if names is not None))

    def abandon(self) -> None:
        """Forget what is under way."""
        self._model = None
        self._forget()
