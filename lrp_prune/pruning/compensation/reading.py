"""What the layers of one stage get: in the dense model, and behind what is pruned and compensated."""

from collections import Counter
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from lrp_prune.engine.uses import Product
from lrp_prune.models.batches import samples_in
from lrp_prune.pruning.choices import Choices
from lrp_prune.pruning.compensation.grouping import Group, Grouped, merged, reading_otherwise
from lrp_prune.pruning.compensation.inputs import ROOM, DenseInputs, Inputs, Planned
from lrp_prune.pruning.compensation.partial_runs import PartialRuns
from lrp_prune.pruning.compensation.repeating import RepeatedUses, Results, settled
from lrp_prune.pruning.compensation.stages import Given, holding
from lrp_prune.pruning.compensation.systems import Systems, taken_of
from lrp_prune.pruning.compensation.wholes import copies_of
from lrp_prune.pruning.pairs import Part
from lrp_prune.pruning.places import Place
from lrp_prune.pruning.processes import Processes


class StageReading:
    """A stage at which a compensation is at work.

    Args:
        name: of the stage.
        module: it.
        held: its parameters, by their names in the model.
        runs: of the model.
        known: what the stages before it give, in the dense model (None where that is not needed) and as they are by now.
        outside: what is pruned in no stage, with its values in the dense model.
        weights: of each batch the tokens' ``[samples, tokens]``, on any device; None where each counts for one.
        processes: those that do this together.
    """

    def __init__(
        self, name: str, module: nn.Module, held: Mapping[str, nn.Parameter], runs: PartialRuns,
        known: tuple[Given | None, Given], outside: Mapping[nn.Parameter, Tensor], weights: list[Tensor | None],
        processes: Processes,
    ) -> None:  # fmt: skip
        self.name, self.module, self.held = name, module, held
        self._runs, self._weights, self._processes = runs, weights, processes
        self._dense, self._pruned = known
        self.before = copies_of(held)
        """What its dense weights are, as far as they are here."""
        self._outside = {} if self._dense is None else outside
        self._inputs = DenseInputs(ROOM // len(runs.batches))
        self._planned = list[Planned]()
        self._repeats = runs.device.type == "cpu"  # others multiply again in less time than the host gives a result

    def run_dense(self) -> tuple[list[Group], list[Any]]:
        """Run it with its dense weights; the layers in groups that read the same input, and what it gives to each batch."""
        groups, outputs = list[Group](), []
        with self._processes.agreeing():
            for index in range(len(self._runs.batches)):
                made = Choices()
                seen = Grouped(self._runs.masks, groups, self.held, partial(self._keep, index), made)
                results = Results(partial(self._inputs.left, index)) if self._repeats else None
                with holding(self._outside):
                    outputs.append(self._runs.run(index, self.module, self._dense or self._pruned, seen, made))
                self._planned.append(
                    Planned(Counter(place for place, _ in seen.order), made.made, seen.products, results)
                )
        groups = self._parted(merged(self._processes.gathered(groups)))
        self._inputs.dropped.update(*self._processes.gathered(self._inputs.dropped))
        return groups, outputs

    def _parted(self, groups: list[Group]) -> list[Group]:
        """Groups whose layers read the same at each of their uses in each batch; the others are alone."""
        found = list[Group]()
        for group in groups:
            own = reading_otherwise(group, [plan.products for plan in self._planned])
            alone = [place for place in group if any(place in theirs for theirs in self._processes.gathered(own))]
            found += [[place for place in group if place not in alone], *([place] for place in alone)]
            self._inputs.dropped.update((index, place) for place in alone for index in range(len(self._planned)))
        return found

    def summed(self, place: Place, changing: Collection[Place], parted: bool) -> Systems:
        """The sums of what a layer gets, over all batches of all processes, with weights as they are by now.

        Args:
            place: the layer.
            changing: those that are still to be changed, itself among them.
            parted: whether halves of few samples are told apart.
        """
        systems = Systems(parted)
        with self._processes.agreeing():
            for index, plan in enumerate(self._planned):
                # In step each runs the stage to its end, whether it uses the layer or not.
                if plan.uses[place] or self._processes.in_step:
                    self._add(systems, place, index, plan, settled(plan.products, changing))
        systems.over(self._processes, self._runs.device)
        return systems

    def outputs(self, trained: bool) -> list[Any]:
        """What it gives to each batch as it is by now.

        Args:
            trained: whether something else than its layers' sums was used to change it.
        """
        found = []
        with self._processes.agreeing():
            for index, plan in enumerate(self._planned):
                results = None if trained else plan.results
                uses = RepeatedUses(plan.products, results, settled(plan.products, (), choosing=True), last=True)
                found.append(self._runs.run(index, self.module, self._pruned, uses))
        return found

    def _add(self, systems: Systems, place: Place, index: int, plan: Planned, settled: int) -> None:
        """Add what a layer gets of one batch."""
        runs, uses = self._runs, None if self._processes.in_step else plan.uses[place]
        batch = runs.layout(index)
        theirs = [] if self._dense is None else self._inputs.taken(index, place, runs.device)
        if theirs is None and self._dense is not None:
            again = Inputs(runs.masks, place, uses, batch, products=plan.products)
            with holding({**self._outside, **{self.held[name]: value for name, value in self.before.items()}}):
                runs.run(index, self.module, self._dense, again, Choices(plan.choices))
            theirs = again.rows
        ours = Inputs(
            runs.masks, place, uses, batch, self._weights[index],
            products=plan.products, results=plan.results, settled=settled,
        )  # fmt: skip
        runs.run(index, self.module, self._pruned, ours, Choices(plan.choices))
        systems.known = systems.known and not ours.unknown
        several = len(runs.batches) > 1 or not self._processes.alone
        half = self._processes.half(index) if several and samples_in(runs.batches[index]) == 1 else None
        for number, rows in enumerate(ours.rows):
            dense_rows = theirs[number] if theirs is not None and number < len(theirs) else None
            systems.add(rows, dense_rows, ours.weights[number], half)

    def _keep(self, index: int, part: Part, found: Product) -> None:
        if self._dense is not None:
            self._inputs.add(index, part.place, taken_of(found, part, self._runs.layout(index)))
