"""Fitting scales and shifts to the outputs of a dense model, at several strengths side by side, and judging them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.engine.batch_layout import BatchLayout
from lrp_prune.engine.uses import WeightUses
from lrp_prune.models.batches import in_groups, laid_together, to_device
from lrp_prune.models.padding import counted_tokens
from lrp_prune.pruning.choices import Choices
from lrp_prune.pruning.laying import gives_the_same
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.moments import PairedMoments
from lrp_prune.pruning.pairs import DenseOutputs, PrunedUses
from lrp_prune.pruning.passes import Change, distances, normalizing, outputs_of
from lrp_prune.pruning.places import Place
from lrp_prune.pruning.processes import Processes, Turn, Turns
from lrp_prune.pruning.zeroed import zeroed

ENTRIES = 1 << 28
"""Entries of layers' outputs that are kept at a time, of the dense model: 1 GB in float32."""


class Candidate:
    """One strength: its moments so far, and how far its outputs were from the dense ones."""

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.channels: dict[Place, PairedMoments] = {}
        self.norms: dict[str, PairedMoments] = {}
        self.distances: list[list[float | None]] = []
        """Of each batch that was judged, output by output; None where an output cannot be compared."""

    def normalized(
        self, name: str, x: Tensor, dense: Tensor | None, turns: Turns | None, adding: bool
    ) -> Change | None:
        """How the statistics of a batch normalization have to move for what it gets."""
        if self.strength == 0:
            return None
        if turns is not None:
            fresh = PairedMoments(x.shape[1])
            if adding and dense is not None and dense.shape == x.shape:
                fresh.add(_by_place(x), _by_place(dense))
            whole = turns.summed(name, fresh)
            if whole is not None:
                self.norms.setdefault(name, PairedMoments(x.shape[1])).merge([whole])
        return self.norms[name].change() if name in self.norms and self.norms[name].told else None


def _by_place(x: Tensor) -> Tensor:
    return x.detach().movedim(1, -1).reshape(-1, x.shape[1])


@dataclass(frozen=True)
class Runs:
    """A model that is run dense, and as candidates would have it.

    Args:
        model: dense; between the runs it is as it was.
        masks: what is to be pruned.
        target: what is explained.
        processes: those that do this together.
        device: of the batches.
        advance: told of each batch that was run.
    """

    model: nn.Module
    masks: Masks
    target: Any
    processes: Processes
    device: torch.device
    advance: Callable[[int], Any]
    seen: dict[str, bool] = field(default_factory=dict)
    """Names of weights that are places, or have some, and whether something else uses one as well."""
    uneven: set[str] = field(default_factory=set)
    """Names of weights whose outputs had another shape once masks were applied."""
    layout: BatchLayout = field(default_factory=BatchLayout)
    """Tells which tokens of the batch at hand are no padding."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """Masks of those of which some entries are pruned: what is added to those stays nothing."""

    def fit(self, batches: list[Any], candidates: Sequence[Candidate]) -> None:
        """Fit scales to batches, laid together to as few as memory allows."""
        for batch, number, adding in self._in_step(list(self._groups(batches))):
            self._compare(batch, candidates, True, adding, number)

    def judge(self, batches: list[Any], candidates: Sequence[Candidate]) -> None:
        """See how far the outputs are from the dense ones with what is known."""
        for batch, number, adding in self._in_step([(batch, 1) for batch in batches]):
            self._compare(batch, candidates, False, adding, number)

    def _groups(self, batches: list[Any]) -> Iterator[tuple[Any, int]]:
        """Batches laid together: what a layer gets depends on the scales of those before.

        Fitted batch by batch, the scales of one layer would be changed again when the next have been fitted to them; deep
        networks with batch normalization amplify that. So as many as possible are run as one, where outputs are the same.
        """
        with self.processes.agreeing():
            uses = DenseOutputs(self.masks)
            self._outputs(batches[0], uses)
        size = min(self.processes.gathered(max(1, ENTRIES // max(uses.entries, 1))))
        both = laid_together(*batches[:2]) if len(batches) > 1 and size > 1 else None
        # Those that run one model together run it as often.
        everyone = self.processes.gathered(both is not None)
        asked = both is not None and (all(everyone) or not self.processes.in_step)
        with self.processes.agreeing():
            alike = asked and gives_the_same(both, batches[0], batches[1], self._outputs)
        yield from in_groups(batches, size if all(self.processes.gathered(alike or both is None)) else 1)

    def _outputs(self, batch: Any, uses: WeightUses | None = None) -> list[Tensor]:
        """What the dense model gives."""
        uses = DenseOutputs(self.masks) if uses is None else uses
        return outputs_of(self.model, to_device(batch, self.device), uses, self.target, Choices())

    def _in_step(self, groups: list[tuple[Any, int]]) -> Iterator[tuple[Any, int, bool]]:
        """The same number in each process: one that has no more runs its last again, which does not count."""
        for index in range(max(self.processes.gathered(len(groups)))):
            yield *groups[min(index, len(groups) - 1)], index < len(groups)

    def _compare(self, batch: Any, candidates: Sequence[Candidate], fitting: bool, adding: bool, number: int) -> None:
        """Run a batch, made of so many, dense, and as each candidate would have it."""
        with self.processes.agreeing():
            batch = to_device(batch, self.device)
            self.layout.counted = counted_tokens(self.model, batch, 0)
            dense, choices, norms = DenseOutputs(self.masks), Choices(), dict[str, list[Tensor]]()

            def kept(name: str, x: Tensor) -> None:
                norms.setdefault(name, []).append(x.detach().clone())
                dense.order.append((name, int(x.shape[1])))

            with normalizing(self.model, kept):
                expected = outputs_of(self.model, batch, dense, self.target, choices)
            if not all(bool(torch.isfinite(entry).all()) for entry in expected):
                raise FloatingPointError("the dense model's output is not finite: check the batches and the precision")
            self.advance(number if adding else 0)
        for key, _ in dense.order:
            if isinstance(key, Place):
                for place in (key, *key.also):
                    self.seen[place.name] = self.seen.get(place.name, False) or not dense.is_alone(key)
        turns = Turns(self.processes, [turn for turn in dense.order if _is_alone(turn, dense)]) if fitting else None
        with zeroed(self.model, self.masks):
            for candidate in candidates:
                uses = PrunedUses(
                    self.masks, dense, candidate.channels, candidate.strength, self.layout, turns, adding, self.biases
                )
                inputs = {name: iter(values) for name, values in norms.items()}

                def moved(name: str, x: Tensor, candidate: Candidate = candidate, inputs: Any = inputs) -> Any:
                    there = next(inputs.get(name, iter(())), None)
                    return candidate.normalized(name, x, there, turns, adding)

                with (
                    self.processes.agreeing(),
                    normalizing(self.model, moved),
                    turns.taken() if turns else nullcontext(),
                ):
                    # Fitted, pairs are of the same tokens; judged, the model chooses as it will.
                    again = Choices(choices.made if fitting else None)
                    found = outputs_of(self.model, batch, uses, self.target, again)
                    self.uneven.update(uses.uneven)
                    if not fitting and adding:
                        candidate.distances.append(distances(expected, found, self.target, self.layout.counted))
                    self.advance(number if adding else 0)


def _is_alone(turn: Turn, dense: DenseOutputs) -> bool:
    return not isinstance(turn[0], Place) or dense.is_alone(turn[0])
