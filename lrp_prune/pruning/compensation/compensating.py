"""Going through a model stage by stage: inputs from what is pruned and compensated before, kept weights from least squares."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.attribution.sharded import shardings_of
from lrp_prune.distributed.sharding import device_of, mesh_of
from lrp_prune.models.batches import samples_in, to_device
from lrp_prune.models.subject import subject_of
from lrp_prune.names import named_parameters, resolve
from lrp_prune.progress import Progress, bar, no_bar
from lrp_prune.pruning.choices import Choices
from lrp_prune.pruning.compensation.checking import not_reproduced
from lrp_prune.pruning.compensation.compensated import Compensated
from lrp_prune.pruning.compensation.damping import LEAST
from lrp_prune.pruning.compensation.grouping import Group, merged
from lrp_prune.pruning.compensation.partial_runs import PartialRuns
from lrp_prune.pruning.compensation.reading import StageReading
from lrp_prune.pruning.compensation.refining import Refining
from lrp_prune.pruning.compensation.stages import (
    Given,
    Watched,
    leaving_before,
    made_of,
    stages_of,
)
from lrp_prune.pruning.compensation.systems import Systems
from lrp_prune.pruning.compensation.together import Sized, laid_in_few
from lrp_prune.pruning.compensation.updating import solved_for
from lrp_prune.pruning.compensation.ways import Compensation
from lrp_prune.pruning.compensation.weighing import weights_of_tokens
from lrp_prune.pruning.compensation.wholes import Wholes, copies_of, zero_
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.places import Place
from lrp_prune.pruning.processes import Processes

_WHAT = "compensating"


def compensate_(
    model: nn.Module,
    masks: Masks,
    batches: Iterable[Any],
    compensation: Compensation,
    target: Any = None,
    progress: bool | Progress = False,
    changing: Callable[[Sequence[nn.Parameter]], object] | None = None,
    together: bool = False,
    refining: Refining | None = None,
) -> Compensated:
    """Apply masks to a dense model in place, and update what they keep so that each layer gives what it gave.

    Layers are worked at in the order of execution, those of a stage (a block that repeats) in groups that read the same input,
    with inputs from what is pruned and compensated before. In memory are at a time the products of one group's inputs, a stage's
    dense weights, and, on the CPU, what stages gave to each batch as far as others are made of it, and what one stage's layers
    got in the dense model (at most :data:`ROOM`; the rest is computed again). No mask changes. If an error is raised,
    weights that are done keep their new values: who wants them back keeps them when ``changing`` names them.

    Small batches are laid together as far as they fit and the model's outputs stay the same to rounding. Processes that do this
    together sum their products, whatever batches each of them has, and solve for some rows of each layer each. Those that a model
    is divided among by ``fully_shard`` do so in any case, with as many batches each: what is dense is kept in parts, and one
    layer at a time is whole.

    Args:
        model: the dense model, see :func:`lrp_prune.attribute`.
        masks: what is pruned; their weights are zeroed here.
        batches: reference samples, all of which are used.
        compensation: how.
        target: what is explained; a function of model and batch is run in the model's place.
        progress: show a progress bar, or what shows another.
        changing: is told which parameters are about to change.
        together: whether all processes of a run do this at the same time, each with a whole model and batches of its own, for one
            result. Those that a model is divided among do in any case.
        refining: is given each stage once its weights are updated, to train them further.

    Raises:
        ValueError: there is no batch, or not as many in each process that has a part of the model.
        RuntimeError: another process has an error.
        FloatingPointError: a layer's inputs are not finite.

    Example:
        >>> import lrp_prune
        >>> from lrp_prune.pruning import LeastSquares
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> batches = [(torch.randn(64, 16), torch.randint(4, (64,)))]
        >>> masks = lrp_prune.select(lrp_prune.attribute(model, batches), sparsity=0.5)
        >>> compensate_(model, masks, batches, LeastSquares()).left_out
        {}
    """
    subject = subject_of(model)
    module = subject.module
    mesh = mesh_of(module) if shardings_of(module) else None  # or refused, where it is divided in another way
    device = next(module.parameters()).device if mesh is None else device_of(mesh)
    processes = (
        Processes.of_run(device, _WHAT) if together and mesh is None else Processes(mesh, _WHAT, mesh is not None)
    )
    with processes.agreeing():
        reference = list(batches)
        if not reference:
            raise ValueError("no batch was seen: compensation needs reference samples")
        samples = sum(map(samples_in, reference))
    processes.check_numbers(len(reference))
    shown = progress if callable(progress) else bar if progress else no_bar
    target = subject.own_target if subject.own_target is not None and not callable(target) else target
    begun = time.perf_counter()
    changing = changing or (lambda _: None)
    runs = PartialRuns(module, masks, reference, target, device)
    run = _Compensating(runs, compensation, processes, changing, refining)
    found = run.run(shown)
    found.samples = sum(processes.gathered(samples))
    found.seconds = time.perf_counter() - begun
    return found


_ENOUGH = 2
"""Rows for each input, below which the least squares are said to be of few.

Of SmolLM2, whose layers have 576 and 1,536 inputs, 1,024 tokens gave a perplexity of 43.5, where the mask alone had 39.0.
"""


class _Compensating:
    """One run through a model."""

    def __init__(
        self, runs: PartialRuns, way: Compensation, processes: Processes,
        changing: Callable[[Sequence[nn.Parameter]], object], refining: Refining | None,
    ) -> None:  # fmt: skip
        self._runs, self._way, self._refining = runs, way, refining
        self._processes, self._changing = processes, changing
        self._parameters = named_parameters(runs.module)
        self._pruned = {name: weight for name, weight in self._masked().items() if runs.masks.pruned_in(name)}
        self._outside: dict[nn.Parameter, Tensor] = {}
        self._tied: set[Place] = set()
        self._used: set[str] = set()
        self._largest = 0
        self._weights: list[dict[str, Tensor]] = []
        self._result = Compensated()

    def run(self, shown: Progress) -> Compensated:
        candidates, forwards = self._candidates()
        stages = self._reproduced(self._stages(candidates, forwards), forwards)
        needed = {"": set[str]()} if self._result.as_one else made_of(forwards, stages)
        if stages and self._refining is None:  # which trains on small batches
            ending = partial(self._runs.outputs_after, list(stages.values())[-1])
            self._runs.batches = laid_in_few(self._runs.batches, self._largest, ending, self._processes)
        if self._way.weights is not None:
            with self._processes.agreeing():
                self._weigh([name for name in stages if name])
        self._zero_outside(stages)
        dense, pruned = (Given(stages, needed, "cpu") for _ in range(2))
        with shown("Compensating", len(stages)) as advance:
            for name, stage in stages.items():
                self._stage(name, stage, dense, pruned)
                advance(1)
        self._name_the_rest()
        return self._result

    def _candidates(self) -> tuple[dict[str, nn.Module], list[Watched]]:
        """What may be stages, and what forwards tell of them: a module whose weights are used by another one is in that."""
        passed_by = set[str]()
        while True:
            candidates = stages_of(self._runs.module, self._pruned, passed_by)
            with self._processes.agreeing():
                forwards = self._watch(candidates)
            found = {name for name, stage in candidates.items() if self._is_used_alone(stage, name, forwards)}
            more = set().union(*self._processes.gathered(found)) - passed_by
            if not more:
                return candidates, forwards
            passed_by |= more

    def _is_used_alone(self, stage: nn.Module, name: str, forwards: list[Watched]) -> bool:
        if not name or any(watched.calls[name] for watched in forwards):
            return False
        inside = set(map(id, stage.parameters()))
        return any(id(weight) in inside and of in self._used for of, weight in self._pruned.items())

    def _watch(self, candidates: Mapping[str, nn.Module]) -> list[Watched]:
        """Dense forwards until every stage was run: what runs when, what is used elsewhere as well, and how large outputs are."""
        forwards, uses = list[Watched](), Sized(self._runs.masks)
        for batch in self._runs.batches:
            watched = Watched(candidates)
            with watched.watching():
                self._runs.outputs(batch, uses, Choices())
            forwards.append(watched)
            if not self._processes.in_step and all(any(entry.calls[name] for entry in forwards) for name in candidates):
                break
        self._tied, self._largest, self._used = uses.tied, uses.largest, uses.used
        return forwards

    def _stages(self, candidates: Mapping[str, nn.Module], forwards: list[Watched]) -> dict[str, nn.Module]:
        """The stages that run once, in the order of execution, the same in each process; the rest is named."""
        seen = [(watched.order, dict(watched.calls)) for watched in forwards]
        everyone = self._processes.gathered((seen, self._tied))
        self._tied = set().union(*(tied for _, tied in everyone))
        every = [forward for theirs, _ in everyone for forward in theirs]
        calls = {name: max(theirs.get(name, 0) for _, theirs in every) for name in candidates}
        for name, stage in candidates.items():
            reason = {0: "is never run", 1: None}.get(calls[name], "is in a module that is run several times")
            if reason is None and self._processes.in_step and not all(theirs.get(name) for _, theirs in every):
                reason, calls[name] = "is not run with every batch, as processes have to that run it together", 0
            if reason:
                self._leave_out(stage, reason)
        order = merged([[[name] for name in theirs] for theirs, _ in every])
        return {name: candidates[name] for (name,) in order if calls[name] == 1}

    def _reproduced(self, stages: dict[str, nn.Module], forwards: list[Watched]) -> dict[str, nn.Module]:
        """The stages, if each is made of what others give and of nothing else; otherwise the model as one stage, and named.

        Where it cannot be one, as it is trained stage by stage or divided among processes, those that are not are only masked.
        """
        wrong = not_reproduced(self._runs, stages, made_of(forwards, stages), self._processes)
        if not wrong:
            return stages
        if self._refining is None and not self._processes.in_step:
            self._result.as_one, self._result.left_out = wrong, {}
            return {"": self._runs.module}
        for name in wrong:
            self._leave_out(stages.pop(name), "reads something of layers before it beside what these give")
        return stages

    def _weigh(self, stages: list[str]) -> None:
        """Weights of tokens, from relevance in the dense model."""
        runs = self._runs
        for batch in runs.batches:
            found = weights_of_tokens(runs.module, to_device(batch, runs.device), runs.target, stages)
            self._weights.append({name: weights.cpu() for name, weights in found.items()})

    def _leave_out(self, stage: nn.Module, reason: str) -> None:
        inside = {id(parameter) for parameter in stage.parameters()}
        for name, weight in self._pruned.items():
            if id(weight) in inside:
                self._result.left_out.setdefault(name, reason)

    def _stage(self, name: str, module: nn.Module, dense: Given, pruned: Given) -> None:
        inside = {id(parameter) for parameter in module.parameters()} - {id(parameter) for parameter in self._outside}
        held = {key: weight for key, weight in self._parameters.items() if id(weight) in inside}
        both = self._way.dense > 0
        weights = [own.get(name) for own in self._weights] or [None] * len(self._runs.batches)
        known = (dense if both else None, pruned)
        reading = StageReading(name, module, held, self._runs, known, self._outside, weights, self._processes)
        groups, outputs = reading.run_dense()
        self._mask(reading, groups)
        done = self._refining is not None and self._refining.restored(name, held)
        if not done and (self._refining is None or self._refining.updates):
            self._update(reading, groups)
        if self._refining is not None and not done:
            inputs = partial(self._runs.run, stage=module, known=pruned, leaving=leaving_before)
            with torch.autocast(self._runs.device.type, enabled=False):
                self._refining.refine(
                    name, module, held, inputs, outputs, lambda index: self._runs.layout(index).counted
                )
        if both:
            dense.keep(name, outputs)
        pruned.keep(name, reading.outputs(trained=self._refining is not None))

    def _masked(self) -> dict[str, nn.Parameter]:
        return resolve(self._runs.masks, self._runs.module)

    def _mask(self, stage: StageReading, groups: list[Group]) -> None:
        """Apply masks to a stage."""
        inside, masked = set(map(id, stage.held.values())), self._masked()
        biases = [self._parameters[place.bias.name] for group in groups for place in group if place.bias is not None]
        everything = stage.held.values() if self._refining is not None else ()
        self._changing([*(weight for weight in masked.values() if id(weight) in inside), *biases, *everything])
        zero_(self._runs.masks, masked, stage.held.values())

    def _update(self, stage: StageReading, groups: list[Group]) -> None:
        """Solve for what is kept of a stage's layers, one group after the other."""
        wholes = Wholes(self._parameters, stage.before, self._runs.masks)
        for number, group in enumerate(groups):
            wanted = [place for place in group if place.name in self._pruned]
            for place in wanted:
                if place in self._tied:
                    self._result.left_out[place.name] = "is used by something else as well"
            alone = [place for place in wanted if place not in self._tied]
            if alone:
                changing = [place for later in groups[number:] for place in later]
                systems = stage.summed(group[0], changing, parted=self._way.damping is None)
                if self._way.weights is not None and not systems.weighed:
                    self._result.unweighed += dict.fromkeys(place.name for place in alone)
                for place in alone:
                    self._solve(place, systems, wholes)

    def _solve(self, place: Place, systems: Systems, wholes: Wholes) -> None:
        whole = wholes.of(place)
        with torch.autocast(self._runs.device.type, enabled=False):
            with self._processes.agreeing():
                solved = solved_for(place, systems, whole, self._way, self._processes)
            if isinstance(solved, str):
                self._result.left_out[place.name] = solved
            else:
                self._result.note(place.name, *solved.write_(self._processes))
                if systems.count < _ENOUGH * systems.inputs:
                    self._result.few.setdefault(place.name, (systems.count, systems.inputs))
                if self._way.damping is None and solved.damping > LEAST:
                    self._result.held[place.name] = max(solved.damping, self._result.held.get(place.name, 0.0))

    def _zero_outside(self, stages: Mapping[str, nn.Module]) -> None:
        """Apply masks to what is in no stage or in several, and remember the dense model's values."""
        inside = Counter(id(parameter) for stage in stages.values() for parameter in stage.parameters())
        outside = {name: weight for name, weight in self._pruned.items() if inside[id(weight)] != 1}
        for name, weight in outside.items():
            if inside[id(weight)] > 1:
                self._result.left_out[name] = "is used by something else as well"
        self._outside = {outside[name]: value for name, value in copies_of(outside).items()}
        self._changing(list(outside.values()))
        zero_(self._runs.masks, self._masked(), outside.values())

    def _name_the_rest(self) -> None:
        for name, weight in self._pruned.items() if self._refining is None else ():
            if (
                name not in self._result.errors and weight.dim() > 1
            ):  # biases go along, and norms have nothing to solve for
                self._result.left_out.setdefault(name, "is in no product whose inputs could be told for each output")
