"""The recipe of the correction examples: a patch by contrastive relevance, in rounds."""

from collections.abc import Callable, Sequence
from typing import Any

from correction_study import Batch
from language_model import perplexity
from presenting import progress
from torch import Tensor
from transformers import PreTrainedModel

import lrp_prune
from lrp_prune import Patch, Relevance
from lrp_prune.correction import Guard
from lrp_prune.targets import NextToken


def last_within(model: PreTrainedModel, patches: Sequence[Patch], strength: float, text: Tensor, allowed: float) -> int:
    """The number of the last patch that makes the perplexity of a text grow by at most the allowed share; 0 if none does."""
    plain = perplexity(model, text)
    last = 0
    for number, patch in enumerate(patches):
        patch.apply_(model, strength)
        cost = perplexity(model, text) / plain - 1
        patch.revert_(model)
        print(f"{patch.num_entries:,} weights: {cost:+.2%} perplexity on text to choose by", flush=True)
        if cost <= allowed:
            last = number
    return last


class ContrastRounds:
    """Makes patches from what serves a behaviour and not general text.

    Args:
        model: The model, which is as before after every call.
        general: Batches of general text.
        target: What is explained of the behaviour.
        behaviour: Its name.
        composite: The rules that propagate relevance.
        guard: The share of the weights that may be chosen; the others matter to some token of the general text.
        guard_by: What tells them, if it is collected already.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        general: list[Batch],
        target: Any,
        behaviour: str,
        composite: str,
        guard: float,
        guard_by: Relevance | None = None,
    ) -> None:
        self.model, self.general, self.target, self.behaviour = model, general, target, behaviour
        self.composite, self.guard = composite, guard
        self.guard_by = guard_by or self._explain(general, NextToken(odds=0), "squared_token")

    @property
    def names(self) -> list[str]:
        """The weights that are chosen from."""
        return list(self.guard_by)

    def _explain(self, batches: Sequence[Batch], target: Any, statistic: str) -> Relevance:
        shown = progress(batches, f"{self.composite}: {target}")
        # First tokens are sinks of attention, whose activations dwarf all others.
        return lrp_prune.attribute(self.model, shown, target, self.composite, statistic, skip_first=1)

    def collect(self, undesired: list[Batch]) -> tuple[Relevance, Relevance]:
        """The relevance of general text and of the behaviour, on the model as it is now."""
        return self._explain(self.general, NextToken(odds=0), "signed"), self._explain(undesired, self.target, "signed")

    def patch(
        self,
        sets: tuple[Relevance, Relevance],
        amount: float | int,
        extends: Patch | None = None,
        general_weight: float = 1.0,
    ) -> Patch:
        """The weights with the lowest contrast, and those of the patch that is applied."""
        general, undesired = (relevance.normalized("total") for relevance in sets)
        return Patch.from_contrast(
            self.model,
            general * general_weight,
            undesired,
            amount,
            normalize=None,
            guard=Guard(self.guard, by=self.guard_by),
            behaviour=self.behaviour,
            extends=extends,
        )

    def rounds(
        self,
        first: list[Batch],
        again: Callable[[], list[Batch]],
        amount: float,
        further: Sequence[float],
        general_weight: float,
        strength: float,
    ) -> list[Patch]:
        """Patches of growing size: of the first round, and of the second one with each of its amounts.

        Args:
            first: Batches that show the behaviour.
            again: Makes such batches of the model as it is corrected by the first round; none ends it there.
            amount: Fraction of the weights in the first round.
            further: Fractions of the weights that the second round adds; none for no second round.
            general_weight: Of the general set in the second round. What the behaviour is served by less clearly than before
                is otherwise outweighed.
            strength: By how much the weights are weakened.
        """
        patches = [self.patch(self.collect(first), amount)]
        if further:
            start = patches[0]
            start.apply_(self.model, strength)
            try:
                batches = again()
                if batches:
                    sets = self.collect(batches)
                    patches += [self.patch(sets, more, start, general_weight) for more in sorted(further)]
            finally:
                start.revert_(self.model)
        for patch in patches:
            patch.provenance["strength"] = strength
        return patches
