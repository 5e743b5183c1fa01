"""Going through a model stage by stage: inputs from what is pruned and compensated before, kept weights from least squares."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.attribution.sharded import shardings_of
from lrp_prune.distributed.sharding import device_of, mesh_of
from lrp_prune.engine.uses import Product, WeightUses
from lrp_prune.models.batches import samples_in, to_device
from lrp_prune.models.padding import counted_tokens
from lrp_prune.models.subject import subject_of
from lrp_prune.names import named_parameters, resolve
from lrp_prune.progress import Progress, bar, no_bar
from lrp_prune.pruning.choices import Choices
from lrp_prune.pruning.compensation.compensated import Compensated
from lrp_prune.pruning.compensation.inputs import ROOM, DenseInputs, Group, Grouped, Inputs, Planned, Stage, merged
from lrp_prune.pruning.compensation.refining import Refining
from lrp_prune.pruning.compensation.stages import (
    Given,
    Leaving,
    StageReached,
    Watched,
    holding,
    leaving_after,
    leaving_before,
    made_of,
    stages_of,
)
from lrp_prune.pruning.compensation.systems import Systems, taken_of
from lrp_prune.pruning.compensation.together import Outputs, Sized, laid_in_few
from lrp_prune.pruning.compensation.updating import solved_for
from lrp_prune.pruning.compensation.ways import Compensation
from lrp_prune.pruning.compensation.weighing import weights_of_tokens
from lrp_prune.pruning.compensation.wholes import Wholes, copies_of, zero_
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.pairs import Part, PlacedUses
from lrp_prune.pruning.passes import outputs_of, tensors_in
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
    run = _Compensating(module, masks, reference, compensation, target, processes, device, changing, refining)
    found = run.run(shown)
    found.samples = sum(processes.gathered(samples))
    found.seconds = time.perf_counter() - begun
    return found


class _Compensating:
    """One run through a model."""

    def __init__(
        self, module: nn.Module, masks: Masks, batches: list[Any], way: Compensation, target: Any, processes: Processes,
        device: torch.device, changing: Callable[[Sequence[nn.Parameter]], object], refining: Refining | None,
    ) -> None:  # fmt: skip
        self._refining = refining
        self._device = device
        self._module, self._masks, self._batches, self._way, self._target = module, masks, batches, way, target
        self._processes, self._changing = processes, changing
        self._parameters = named_parameters(module)
        self._pruned = {name: weight for name, weight in resolve(masks, module).items() if masks.pruned_in(name)}
        self._outside: dict[nn.Parameter, Tensor] = {}
        self._tied: set[Place] = set()
        self._largest = 0
        self._weights: list[dict[str, Tensor]] = []
        self._result = Compensated()

    def run(self, shown: Progress) -> Compensated:
        candidates = stages_of(self._module, self._pruned)
        with self._processes.agreeing():
            forwards = self._watch(candidates)
        stages = self._stages(candidates, forwards)
        needed = made_of(forwards, stages)
        if stages and self._refining is None:  # which trains on small batches
            self._batches = laid_in_few(self._batches, self._largest, self._ending(stages), self._processes)
        if self._way.weights is not None:
            with self._processes.agreeing():
                self._weigh(list(stages))
        self._zero_outside(stages)
        dense, pruned = (Given(stages, needed, "cpu") for _ in range(2))
        with shown("Compensating", len(stages)) as advance:
            for name, stage in stages.items():
                self._stage(name, stage, dense, pruned)
                advance(1)
        self._name_the_rest()
        return self._result

    def _watch(self, candidates: Mapping[str, nn.Module]) -> list[Watched]:
        """Dense forwards until every stage was run: what runs when, what is used elsewhere as well, and how large outputs are."""
        forwards, uses = list[Watched](), Sized(self._masks)
        for batch in self._batches:
            watched = Watched(candidates)
            with watched.watching():
                self._outputs(batch, uses, Choices())
            forwards.append(watched)
            if not self._processes.in_step and all(any(entry.calls[name] for entry in forwards) for name in candidates):
                break
        self._tied, self._largest = uses.tied, uses.largest
        return forwards

    def _ending(self, stages: Mapping[str, nn.Module]) -> Outputs:
        """From a batch to what the last stage gives: what comes behind it is not looked at."""

        def outputs(batch: Any) -> list[Tensor]:
            found: list[Tensor] = []
            with (
                leaving_after(list(stages.values())[-1], lambda output: found.extend(tensors_in(output))),
                suppress(StageReached),
            ):
                self._outputs(batch, PlacedUses(self._masks), Choices())
            return found

        return outputs

    def _outputs(self, batch: Any, uses: WeightUses, choices: Choices) -> list[Tensor]:
        return outputs_of(self._module, to_device(batch, self._device), uses, self._target, choices)

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

    def _weigh(self, stages: list[str]) -> None:
        """Weights of tokens, from relevance in the dense model."""
        for batch in self._batches:
            found = weights_of_tokens(self._module, to_device(batch, self._device), self._target, stages)
            self._weights.append({name: weights.cpu() for name, weights in found.items()})

    def _leave_out(self, stage: nn.Module, reason: str) -> None:
        inside = {id(parameter) for parameter in stage.parameters()}
        for name, weight in self._pruned.items():
            if id(weight) in inside:
                self._result.left_out.setdefault(name, reason)

    def _stage(self, name: str, module: nn.Module, dense: Given, pruned: Given) -> None:
        inside = {id(parameter) for parameter in module.parameters()}
        held = {key: weight for key, weight in self._parameters.items() if id(weight) in inside}
        both = self._way.dense > 0
        stage = Stage(name, module, held, copies_of(held), DenseInputs(ROOM // len(self._batches)))
        groups, planned, outputs = list[Group](), list[Planned](), []
        with self._processes.agreeing():
            for index in range(len(self._batches)):
                told = partial(self._keep_inputs, stage.inputs, index) if both else _ignored
                made, seen = Choices(), Grouped(self._masks, groups, held, told)
                with holding(self._outside if both else {}):
                    outputs.append(self._run(index, module, dense if both else pruned, seen, made))
                planned.append(Planned(Counter(place for place, _ in seen.order), made.made))
        groups = merged(self._processes.gathered(groups))
        stage.inputs.dropped.update(*self._processes.gathered(stage.inputs.dropped))
        written = [place.bias.name for group in groups for place in group if place.bias is not None]
        weights = resolve(self._masks, self._module)
        masked = [weight for weight in weights.values() if id(weight) in inside]
        everything = held.values() if self._refining is not None else ()
        self._changing([*masked, *(self._parameters[key] for key in written), *everything])
        zero_(self._masks, weights, held.values())
        done = self._refining is not None and self._refining.restored(name, held)
        if done or (self._refining is not None and not self._refining.updates):
            groups = []
        wholes = Wholes(self._parameters, stage.before, self._masks)
        for group in groups:
            wanted = [place for place in group if place.name in self._pruned]
            for place in wanted:
                if place in self._tied:
                    self._result.left_out[place.name] = "is used by something else as well"
            alone = [place for place in wanted if place not in self._tied]
            if alone:
                with self._processes.agreeing():
                    systems = self._summed(stage, group[0], dense, pruned, planned)
                if self._way.weights is not None and not systems.weighed:
                    self._result.unweighed += dict.fromkeys(place.name for place in alone)
                systems.over(self._processes, self._device)
                for place in alone:
                    self._solve(place, systems, wholes)
        if self._refining is not None and not done:
            inputs = partial(self._run, stage=module, known=pruned, uses=None, choices=None, leaving=leaving_before)
            with torch.autocast(self._device.type, enabled=False):
                self._refining.refine(name, module, held, inputs, outputs)
        if both:
            dense.keep(name, outputs)
        with self._processes.agreeing():
            pruned.keep(name, [self._run(index, module, pruned, None, None) for index in range(len(self._batches))])

    def _solve(self, place: Place, systems: Systems, wholes: Wholes) -> None:
        whole = wholes.of(place)
        with torch.autocast(self._device.type, enabled=False):
            with self._processes.agreeing():
                solved = solved_for(place, systems, whole, self._way, self._processes)
            if isinstance(solved, str):
                self._result.left_out[place.name] = solved
            else:
                self._result.note(place.name, *solved.write_(self._processes))

    def _summed(self, stage: Stage, place: Place, dense: Given, pruned: Given, planned: list[Planned]) -> Systems:
        """The inputs of a layer, over all batches of this process."""
        systems = Systems()
        for index, batch in enumerate(self._batches):
            plan = planned[index]
            in_step = self._processes.in_step  # each runs the stage to its end, whether it uses the layer or not
            if not plan.uses[place] and not in_step:
                continue
            uses = None if in_step else plan.uses[place]
            counted = counted_tokens(self._module, to_device(batch, self._device), 0)
            weights = self._weights[index].get(stage.name) if self._weights else None
            theirs = stage.inputs.taken(index, place, self._device) if self._way.dense > 0 else []
            if theirs is None:
                again = Inputs(self._masks, place, uses, counted)
                with holding({**self._outside, **stage.dense}):
                    self._run(index, stage.module, dense, again, Choices(plan.choices))
                theirs = again.rows
            ours = Inputs(self._masks, place, uses, counted, weights)
            self._run(index, stage.module, pruned, ours, Choices(plan.choices))
            systems.known = systems.known and not ours.unknown
            for number, rows in enumerate(ours.rows):
                dense_rows = theirs[number] if number < len(theirs) else None
                systems.add(rows, dense_rows, ours.weights[number])
        return systems

    def _keep_inputs(self, inputs: DenseInputs, index: int, part: Part, found: Product) -> None:
        counted = counted_tokens(self._module, to_device(self._batches[index], self._device), 0)
        inputs.add(index, part.place, taken_of(found, part, counted))

    def _run(
        self, index: int, stage: nn.Module, known: Given, uses: WeightUses | None, choices: Choices | None,
        leaving: Leaving = leaving_after,
    ) -> Any:  # fmt: skip
        """Run a batch until the stage is done, and return what that gives, or before it what it is given, to be kept."""
        kept: list[Any] = []
        uses = PlacedUses(self._masks) if uses is None else uses
        torch.clear_autocast_cache()  # which may have weights as they were
        with (
            known.standing_in(index),
            leaving(stage, lambda output: kept.append(known.taken(output))),
            suppress(StageReached),
        ):
            self._outputs(self._batches[index], uses, Choices() if choices is None else choices)
        return kept[0] if kept else None

    def _zero_outside(self, stages: Mapping[str, nn.Module]) -> None:
        """Apply masks to what is in no stage, and remember the dense model's values."""
        inside = {id(parameter) for stage in stages.values() for parameter in stage.parameters()}
        outside = {name: weight for name, weight in self._pruned.items() if id(weight) not in inside}
        self._outside = {outside[name]: value for name, value in copies_of(outside).items()}
        self._changing(list(outside.values()))
        zero_(self._masks, resolve(self._masks, self._module), outside.values())

    def _name_the_rest(self) -> None:
        for name, weight in self._pruned.items() if self._refining is None else ():
            if (
                name not in self._result.errors and weight.dim() > 1
            ):  # biases go along, and norms have nothing to solve for
                self._result.left_out.setdefault(name, "is in no product whose inputs could be told for each output")


def _ignored(*_: Any) -> None:
    """Nobody is told."""
