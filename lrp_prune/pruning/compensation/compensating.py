"""Going through a model stage by stage: inputs from what is pruned and compensated before, kept weights from least squares."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.attribution.sharded import shardings_of
from lrp_prune.engine.call import Call
from lrp_prune.engine.uses import Product, WeightUses
from lrp_prune.models.batches import to_device
from lrp_prune.models.padding import counted_tokens
from lrp_prune.models.subject import subject_of
from lrp_prune.names import named_parameters, resolve
from lrp_prune.progress import Progress, bar, no_bar
from lrp_prune.pruning.choices import Choices
from lrp_prune.pruning.compensation.matrices import Matrix
from lrp_prune.pruning.compensation.stages import Given, StageReached, Watched, leaving_after, stages_of
from lrp_prune.pruning.compensation.systems import Systems, rows_of
from lrp_prune.pruning.compensation.ways import Compensation
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.pairs import Part, PlacedUses, computed, given, parts_of
from lrp_prune.pruning.passes import outputs_of
from lrp_prune.pruning.places import Place
from lrp_prune.relevance.unscored import patterns_of

FEWEST = 16
"""Rows that a layer has to get to be compensated."""


@dataclass
class Compensated:
    """What was compensated.

    Args:
        errors: of each weight, the squared error of its outputs that the mask adds to the least squares without one, before and
            after.
        left_out: weights that are only masked, each with the reason.
    """

    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        shares = sorted(after / before for before, after in self.errors.values() if before > 0)
        what = f"{len(self.errors)} weights compensated"
        if shares:
            what += f": in the median {shares[len(shares) // 2]:.0%} of the error that masks make in a layer are left"
        return f"{what}; only masked: {self.masked_only}" if self.left_out else what

    @property
    def masked_only(self) -> str:
        """What was left out, with each reason."""
        told = []
        for reason in dict.fromkeys(self.left_out.values()):
            names = patterns_of(name for name, why in self.left_out.items() if why == reason)
            told.append(f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} ({reason})")
        return "; ".join(told)


def compensate_(
    model: nn.Module,
    masks: Masks,
    batches: Iterable[Any],
    compensation: Compensation,
    target: Any = None,
    progress: bool | Progress = False,
    changing: Callable[[Sequence[nn.Parameter]], object] | None = None,
) -> Compensated:
    """Apply masks to a dense model in place, and update what they keep so that each layer gives what it gave.

    Layers are worked at in the order of execution, those of a stage (a block that repeats) in groups that read the same input,
    with inputs from what is pruned and compensated before. In memory are at a time the products of one group's inputs, a stage's
    dense weights, and what stages gave to each batch as far as others are made of it. No mask changes. If an error is raised,
    weights that are done keep their new values: who wants them back keeps them when ``changing`` names them.

    Args:
        model: the dense model, see :func:`lrp_prune.attribute`.
        masks: what is pruned; their weights are zeroed here.
        batches: reference samples, all of which are used.
        compensation: how.
        target: what is explained; a function of model and batch is run in the model's place.
        progress: show a progress bar, or what shows another.
        changing: is told which parameters are about to change.

    Raises:
        ValueError: there is no batch, or the model is divided among processes.
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
    module = subject_of(model).module
    if shardings_of(module):
        raise ValueError(
            "a model that fully_shard has divided cannot be compensated: pass compensation=None, or prune the whole model"
        )
    reference = list(batches)
    if not reference:
        raise ValueError("no batch was seen: compensation needs reference samples")
    shown = progress if callable(progress) else bar if progress else no_bar
    return _Compensating(module, masks, reference, compensation, target, changing or (lambda _: None)).run(shown)


class _Inputs(WeightUses):
    """Shows what the layers of one group get."""

    def __init__(self, masks: Masks, group: list[Place], counted: Tensor | None) -> None:
        super().__init__(lambda use: [])
        self._masks, self._group, self._counted = masks, group, counted
        self.rows: list[list[Tensor]] = []
        self.unknown = False

    def observed(self, call: Call) -> Any:
        found = self._product(call)
        if found is None:
            return None
        result = computed(found)
        for part in parts_of(found, call, result, self._masks):
            if part.place == self._group[0]:
                rows = rows_of(found, part, self._counted)
                self.unknown = self.unknown or rows is None
                self.rows.append(rows or [])
        return given(found.activation, lambda: result)


class _Planned(PlacedUses):
    """The layers of a stage, in groups that read the same input."""

    def __init__(self, masks: Masks, groups: list[list[Place]], inside: Collection[str]) -> None:
        super().__init__(masks)
        self._groups, self._inside = groups, inside
        self._input: Tensor | None = None
        self._known = {place for group in groups for place in group}

    def _seen(self, part: Part, found: Product, result: Tensor) -> None:
        super()._seen(part, found, result)
        shares = found.activation is self._input and part.rows is None and len(part.place.layout.size) == 2
        self._input = found.activation if len(part.place.layout.size) == 2 and part.rows is None else None
        if part.place in self._known or part.place.name not in self._inside:
            return
        self._known.add(part.place)
        if shares and self._groups:
            self._groups[-1].append(part.place)
        else:
            self._groups.append([part.place])


class _Compensating:
    """One run through a model."""

    def __init__(
        self, module: nn.Module, masks: Masks, batches: list[Any], way: Compensation, target: Any,
        changing: Callable[[Sequence[nn.Parameter]], object],
    ) -> None:  # fmt: skip
        self._module, self._masks, self._batches, self._way, self._target = module, masks, batches, way, target
        self._changing = changing
        self._parameters = named_parameters(module)
        self._pruned = {name: weight for name, weight in resolve(masks, module).items() if masks.pruned_in(name)}
        self._device = next(module.parameters()).device
        self._outside: dict[nn.Parameter, Tensor] = {}
        self._result = Compensated()

    def run(self, shown: Progress) -> Compensated:
        candidates = stages_of(self._module, self._pruned)
        watched, ties = self._watch(candidates)
        stages = {name: candidates[name] for name in watched.order if watched.calls[name] == 1}
        self._zero_outside(stages)
        dense, pruned = (Given(stages, watched.made_of(stages), "cpu") for _ in range(2))
        with shown("Compensating", len(stages)) as advance:
            for name, stage in stages.items():
                self._stage(name, stage, dense, pruned, ties)
                advance(1)
        self._name_the_rest()
        return self._result

    def _watch(self, candidates: Mapping[str, nn.Module]) -> tuple[Watched, PlacedUses]:
        """A dense forward of the first batch: what runs when, and what is used elsewhere as well."""
        watched, uses = Watched(candidates), PlacedUses(self._masks)
        with watched.watching():
            outputs_of(self._module, to_device(self._batches[0], self._device), uses, self._target, Choices())
        for name, stage in candidates.items():
            reason = {0: "is never run", 1: None}.get(watched.calls[name], "is in a module that is run several times")
            if reason:
                self._leave_out(stage, reason)
        return watched, uses

    def _leave_out(self, stage: nn.Module, reason: str) -> None:
        inside = {id(parameter) for parameter in stage.parameters()}
        for name, weight in self._pruned.items():
            if id(weight) in inside:
                self._result.left_out.setdefault(name, reason)

    def _stage(self, name: str, stage: nn.Module, dense: Given, pruned: Given, ties: PlacedUses) -> None:
        inside = {id(parameter) for parameter in stage.parameters()}
        held = {key: weight for key, weight in self._parameters.items() if id(weight) in inside}
        before = {key: weight.detach().clone() for key, weight in held.items()}
        groups: list[list[Place]] = []
        both = self._way.dense > 0
        choices = []
        outputs = []
        for index in range(len(self._batches)):
            made = Choices()
            planned = _Planned(self._masks, groups, held)
            with _holding(self._outside if both else {}):
                outputs.append(self._run(index, stage, dense if both else pruned, planned, made))
            choices.append(made.made)
        written = [place.bias.name for group in groups for place in group if place.bias is not None]
        masked = [weight for weight in resolve(self._masks, self._module).values() if id(weight) in inside]
        self._changing([*masked, *(self._parameters[key] for key in written)])
        self._zero(held)
        for group in groups:
            alone = [place for place in group if ties.is_alone(place)]
            for place in group:
                if place not in alone and place.name in self._pruned:
                    self._result.left_out[place.name] = "is used by something else as well"
            if any(place.name in self._pruned for place in alone):
                systems = self._summed(stage, group, dense, pruned, held, before, choices)
                with torch.autocast(self._device.type, enabled=False):
                    for place in alone:
                        if place.name in self._pruned:
                            self._update(place, systems, before)
        if both:
            dense.keep(name, outputs)
        pruned.keep(name, [self._run(index, stage, pruned, None, None) for index in range(len(self._batches))])

    def _summed(
        self, stage: nn.Module, group: list[Place], dense: Given, pruned: Given, held: Mapping[str, nn.Parameter],
        before: Mapping[str, Tensor], choices: list[list[Tensor]],
    ) -> Systems | None:  # fmt: skip
        """The inputs of a group, over all batches; None where they are not known."""
        systems = Systems()
        for index, batch in enumerate(self._batches):
            counted = counted_tokens(self._module, to_device(batch, self._device), 0)
            theirs = None
            if self._way.dense > 0:
                theirs = _Inputs(self._masks, group, counted)
                with _holding({**self._outside, **{held[key]: value for key, value in before.items()}}):
                    self._run(index, stage, dense, theirs, Choices(choices[index]))
            ours = _Inputs(self._masks, group, counted)
            self._run(index, stage, pruned, ours, Choices(choices[index]))
            if ours.unknown:
                return None
            for number, rows in enumerate(ours.rows):
                systems.add(rows, theirs.rows[number] if theirs is not None and number < len(theirs.rows) else None)
        return systems

    def _run(self, index: int, stage: nn.Module, known: Given, uses: WeightUses | None, choices: Choices | None) -> Any:
        """Run a batch until the stage is done, and return what that gives, to be kept."""
        kept: list[Any] = []
        batch = to_device(self._batches[index], self._device)
        uses = PlacedUses(self._masks) if uses is None else uses
        torch.clear_autocast_cache()  # which may have weights as they were
        with (
            known.standing_in(index),
            leaving_after(stage, lambda output: kept.append(known.taken(output))),
            suppress(StageReached),
        ):
            outputs_of(self._module, batch, uses, self._target, Choices() if choices is None else choices)
        return kept[0] if kept else None

    def _update(self, place: Place, systems: Systems | None, before: Mapping[str, Tensor]) -> None:
        """Solve for one layer, and write what comes out."""
        if systems is None or systems.gram is None:
            self._result.left_out[place.name] = "is in no product whose inputs can be laid out as rows"
            return
        if systems.count < FEWEST:
            self._result.left_out[place.name] = f"is reached by fewer than {FEWEST} samples or tokens"
            return
        weight = Matrix(place, self._parameters, self._masks, len(systems.gram))
        found = weight.values({**self._parameters, **before})  # a bias may be another module's
        gram, crossed = systems.gram.to(found.dtype), systems.crossed
        if not bool(torch.isfinite(gram).all()):
            raise FloatingPointError(f"the inputs of {place.name} are not finite: check the batches and the precision")
        share = self._way.dense if systems.paired and crossed is not None else 0.0
        mixed = gram if crossed is None or share == 0 else gram.lerp(crossed.to(found.dtype), share)
        if not weight.has_bias:
            gram, mixed = gram[:, :-1, :-1], mixed[:, :-1, :-1]
        solved = []
        errors = torch.zeros(2, dtype=torch.float64, device="cpu")
        for group in range(len(gram)):
            own = gram[group].diagonal()
            inputs = own[:-1] if weight.has_bias else own
            damping = self._way.damping * float(inputs.mean())
            if damping == 0:  # nothing ever comes in
                solved.append(found[group] * weight.kept[group])
                continue
            damped = gram[group] + torch.eye(len(own), dtype=gram.dtype, device=gram.device) * damping
            cross = found[group] @ mixed[group] + damping * found[group]
            update = self._way.solve(damped, cross, weight.kept[group], found[group])
            best = torch.cholesky_solve(cross.T, torch.linalg.cholesky(damped)).T
            masked = found[group] * weight.kept[group]
            errors += torch.tensor(
                [_distance(entry, best, damped) for entry in (masked, update)], dtype=torch.float64, device="cpu"
            )
            solved.append(update)
        weight.write_(torch.stack(solved))
        known = self._result.errors.get(place.name, (0.0, 0.0))
        self._result.errors[place.name] = (known[0] + float(errors[0]), known[1] + float(errors[1]))

    def _zero_outside(self, stages: Mapping[str, nn.Module]) -> None:
        """Apply masks to what is in no stage, and remember the dense model's values."""
        inside = {id(parameter) for stage in stages.values() for parameter in stage.parameters()}
        outside = {name: weight for name, weight in self._pruned.items() if id(weight) not in inside}
        self._outside = {weight: weight.detach().clone() for weight in outside.values()}
        self._changing(list(outside.values()))
        self._zero(outside)

    def _zero(self, held: Mapping[str, nn.Parameter]) -> None:
        inside = {id(weight) for weight in held.values()}
        with torch.no_grad():
            for name, weight in resolve(self._masks, self._module).items():
                if id(weight) in inside:
                    weight[~self._masks.part(name, weight)] = 0

    def _name_the_rest(self) -> None:
        for name in self._pruned:
            if name not in self._result.errors:
                self._result.left_out.setdefault(name, "is in no product of a stage that was run")


def _distance(weight: Tensor, best: Tensor, gram: Tensor) -> float:
    """The squared error of outputs beyond that of the least squares without a mask."""
    apart = weight - best
    return float(((apart @ gram) * apart).sum())


@contextmanager
def _holding(values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Parameters with other values, for the time of a context."""
    own = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in own.items():
            parameter.data = value
        torch.clear_autocast_cache()
