"""A correction of any behaviour in one call: relevance of both sides, a search by the worst side effect, and a test."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lrp_prune.attribution import attribute
from lrp_prune.correction.behaviour import Behaviour
from lrp_prune.correction.beside import side_effects_of
from lrp_prune.correction.conditional import ConditionalPatch
from lrp_prune.correction.conditions import ActivationAbove, Learned
from lrp_prune.correction.gating import later_parameters, within_reach
from lrp_prune.correction.guard import Guard
from lrp_prune.correction.patch import Patch
from lrp_prune.correction.search import Automatic, search_amount
from lrp_prune.correction.several import Together
from lrp_prune.correction.trials import Search
from lrp_prune.effects import Effect, SideEffects, Suite
from lrp_prune.models.subject import subject_of
from lrp_prune.relevance import Relevance
from lrp_prune.targets import NextToken

SEARCHED = Automatic(amounts=(0.00005, 0.0002, 0.0004), strengths=(0.25, 0.5))
"""What is tried if nothing else is said: weights that are weakened, not removed."""


class Corrected(NamedTuple):
    """What :func:`correct` found; printing it gives the report.

    Attributes:
        behaviour: what was to go.
        search: all trials, their frontier, and what was chosen and why.
        effects: what the chosen patch does on the halves to test on, beside random weights; None if nothing was chosen.
        limits: what the effects are held to.
        condition: where the patch acts; None for everywhere.
    """

    behaviour: Behaviour
    search: Search
    effects: SideEffects | None
    limits: Mapping[str, float]
    condition: ActivationAbove | None = None

    @property
    def patch(self) -> Patch | None:
        """The chosen patch, with its strength and effects in its description; None if none was within the limits."""
        return self.search.patch

    @property
    def tested(self) -> Effect | None:
        """The behaviour before and after, on the half to test on."""
        return None if self.effects is None else self.effects[self.behaviour.name]

    def __str__(self) -> str:
        parts = [repr(self.behaviour), str(self.search)]
        if self.condition is not None:
            holding = ", ".join(f"{share:.1%} of {name}" for name, share in self.condition.shares.items())
            parts.insert(1, f"The condition at {self.condition.at!r} holds at {holding}.")
        if self.effects is not None and self.patch is not None:
            parts += [str(self.effects), self.patch.provenance["side_effects"]["verdict"]]
        return "\n\n".join(parts)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``report.md``, ``frontier.png``, and of a chosen patch ``patch.safetensors`` and ``side-effects.png``.

        Raises:
            ImportError: without matplotlib.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / "report.md").write_text(f"{self}\n", encoding="utf-8")
        if self.patch is not None and self.effects is not None:
            self.patch.save(path / "patch.safetensors")
            self.effects.plot(path / "side-effects.png", self.limits.get("*"))
        self.search.plot(path / "frontier.png")


def correct(
    model: nn.Module,
    behaviour: Behaviour,
    halves: tuple[Suite, Suite],
    *,
    automatic: Automatic = SEARCHED,
    collecting: Suite | None = None,
    condition: Learned | None = None,
    composite: str = "epsilon",
    guard: float = 0.7,
    random: int = 3,
    seed: int = 0,
) -> Corrected:
    r"""Find the smallest patch against a behaviour that costs nothing else more than is allowed, and test it.

    Relevance is collected of every text of the first suite and of the wanted answers, each a set of its own that counts alike and
    of which any spares what matters to it; and of the answers that show the behaviour. Amounts and strengths are tried on the
    first half, and what is chosen is measured on the second. The model comes out as it went in: ``found.patch.apply_(model,
    found.search.chosen.strength)`` corrects it.

    Args:
        model: a causal language model.
        behaviour: what is to go, see :class:`Behaviour`.
        halves: suites to select by and to test on, ``Suite.halves(tokenizer)`` say, with the limits that everything is held to.
        automatic: what is tried, and how much of the behaviour is to go; its ``allowed`` is in place of the suites' limits.
        collecting: the texts that relevance is collected on, if not those that are selected by.
        condition: where the patch is to act, if not everywhere: it is learned of the same answers and texts, the patch is a
            :class:`ConditionalPatch`, and of the weights only those are chosen that run after the module it looks at.
        composite: the rules.
        guard: the share of the weights that may be chosen.
        random: patches of random weights that the chosen one is tested beside.
        seed: of these.

    Raises:
        ValueError: for halves without a text, and what :func:`search_amount` and :meth:`Patch.from_contrast` raise.
    """
    selection, test = behaviour.suites(halves)
    sets = behaviour.general(halves[0] if collecting is None else collecting)
    learned = None if condition is None else condition.learn(model, behaviour.batches, sets)
    inside, first = subject_of(model).module, behaviour.batches[0]
    later = None if condition is None else later_parameters(inside, condition.at, first)

    def explained(batches: Any, target: Any, statistic: str) -> Relevance:
        # First tokens are sinks of attention, whose activations dwarf all others.
        return attribute(model, batches, target, composite, statistic, skip_first=1)

    def relevance(statistic: str, combination: str) -> Relevance:
        found = Together(combination)
        for name, each in sets.items():  # one after the other: each has a number for each weight
            found.add(name, explained(each, NextToken(odds=0), statistic))
        return found.compute()

    general, guarded = relevance("signed", "mean"), Guard(guard, relevance("squared_token", "largest"))
    undesired = explained(behaviour.batches, behaviour.target, "signed")

    include = None if condition is None or later is None else within_reach(undesired, set(later), condition.at)

    def make(amount: float | int) -> Patch:
        said: dict[str, Any] = {"behaviour": behaviour.name, "references": {"sets": list(sets)}}
        patch = Patch.from_contrast(model, general, undesired, amount, guard=guarded, include=include, **said)
        return patch if learned is None else ConditionalPatch(patch, learned)

    found = search_amount(model, make, behaviour.measure, selection, automatic=automatic, strict=False)
    limits = test.limits(test.allowed if automatic.allowed is None else automatic.allowed)
    effects = None
    if found.patch is not None:
        effects = side_effects_of(found.patch, model, test, allowed=limits, random=random, seed=seed)
    return Corrected(behaviour, found, effects, limits, learned)
