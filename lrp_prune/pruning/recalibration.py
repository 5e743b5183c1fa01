r"""Recalibration: what pruning took of each channel's scale and offset is given back, from forward passes alone.

Weights that are taken away make the outputs of a layer smaller and move their means, and the next layer meets what it was
never trained on; in a deep network that adds up, while what the outputs say is still all there. So in the order of execution,
with inputs from the layers before as they are pruned and recalibrated, each output channel is scaled and shifted to the least
squares of the dense model's (the row of kept weights, then the bias); running means and variances of batch normalizations
move by what has changed. No mask changes, no bias is added, no gradient is needed. Relatives: REPAIR (Jordan et al. 2022, arXiv
2211.08403) for merged networks, data-free bias correction (Nagel et al. 2019, arXiv 1906.04721).

It does not help everywhere: in a language model the full step costs more than it gives, and half of it helps. So several
strengths are carried along, none among them, and the one counts whose model's outputs stay closest to those of the dense one, on
batches that it has not yet been fitted to.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.attribution.sharded import shardings_of
from lrp_prune.distributed.sharding import device_of, local_part, mesh_of, sharding_of
from lrp_prune.engine.origins import Layout
from lrp_prune.models.batches import samples_in
from lrp_prune.models.subject import subject_of
from lrp_prune.names import named_modules, named_parameters
from lrp_prune.progress import Progress, bar, is_first, no_bar
from lrp_prune.pruning.compared import comparing_by
from lrp_prune.pruning.fitting import Candidate, Runs
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.passes import BatchNormalization
from lrp_prune.pruning.places import Place, shifted_in
from lrp_prune.pruning.processes import Processes
from lrp_prune.relevance.unscored import patterns_of
from lrp_prune.targets import Target

_logger = logging.getLogger("lrp_prune")
STRENGTHS = (0.5, 1.0)
"""How much of the least squares is tried, beside nothing."""

LOOKED_AT, _SAMPLES = 16, 256
"""So many batches are looked at, or more if they have fewer samples."""


@dataclass
class Recalibration:
    """Scales and shifts of channels, to be applied after the masks that they were made for.

    Args:
        strength: how much of the least squares was best; 0: nothing is changed.
        divergences: strength -> how far outputs are from the dense model's, on batches that were not yet seen.
        scales: per place in a weight, ``[channels]``.
        shifts: per place, of its bias, beside the scale.
        normalizations: module -> change of the running mean, and factor of the running variance.
        left_out: weights that keep their scale, each with the reason.
    """

    strength: float
    divergences: dict[float, float]
    scales: dict[Place, Tensor] = field(default_factory=dict, repr=False)
    shifts: dict[Place, Tensor] = field(default_factory=dict, repr=False)
    normalizations: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    left_out: dict[str, str] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        tried = ", ".join(f"{strength:g}: {value:.4g}" for strength, value in sorted(self.divergences.items()))
        done = f"at strength {self.strength:g}" if self.strength else "not recalibrated"
        names, reasons = patterns_of(self.left_out), set(self.left_out.values())
        what, why = "as they are" if self.strength else "not fitted", f" ({reasons.pop()})" if len(reasons) == 1 else ""
        left = f"; {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}{why}" if names else ""
        return f"{done} (divergence from the dense model by strength: {tried}){left}"

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters that it changes."""
        places = [entry for place in self.scales for entry in (place, *place.also)]
        biases = [place.bias.name for place in places if place.bias is not None]
        return list(dict.fromkeys([*(place.name for place in places), *biases]))

    def changed(self, model: nn.Module) -> list[Tensor]:
        """Parameters and statistics of a model that :meth:`apply_` changes."""
        parameters, modules = named_parameters(model), named_modules(model)
        statistics = [
            getattr(modules[name], kind) for name in self.normalizations for kind in ("running_mean", "running_var")
        ]
        return [*(parameters[name] for name in self.parameters), *statistics]

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Change a model in place, to which the masks have been applied."""
        parameters, modules = named_parameters(model), named_modules(model)
        scaled: dict[str, list[_Part]] = {}
        shifted: dict[str, list[_Part]] = {}
        for main, scale in self.scales.items():
            for place in (main, *main.also):
                scaled.setdefault(place.name, []).append((place.layout, partial(place.along_weight, scale)))
                if place.bias is not None:
                    scaled.setdefault(place.bias.name, []).append((place.bias.layout, partial(_as_it_is, scale)))
            if main.bias is not None:
                shift = partial(_as_it_is, self.shifts[main])
                shifted.setdefault(main.bias.name, []).append((main.bias.layout, shift))
        for name, parts in scaled.items():
            _change_(parameters[name], parts, Tensor.mul_, 1.0)
        for name, parts in shifted.items():
            _change_(parameters[name], parts, Tensor.add_, 0.0)
        for name, (moved, factor) in self.normalizations.items():
            module = modules[name]
            assert isinstance(module, BatchNormalization)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.add_(moved.to(module.running_mean))
            module.running_var.mul_(factor.to(module.running_var))


_Part = tuple[Layout, Callable[[Tensor], Tensor]]
"""Where in a parameter, and from the entries there to what they are combined with."""


def _as_it_is(values: Tensor, part: Tensor) -> Tensor:
    return values


def _change_(
    parameter: Tensor, parts: Sequence[_Part], combine: Callable[[Tensor, Tensor], Any], neutral: float
) -> None:
    """Combine parts of a parameter with values; of one that is divided among processes what of them is here.

    That takes one tensor of the whole parameter's size for a while, as the parameter's own layer does in a forward.
    """
    here, sharding = local_part(parameter), sharding_of(parameter)
    whole = torch.full(sharding.shape, neutral, dtype=here.dtype, device=here.device) if sharding.is_divided else here
    for layout, values in parts:
        part = layout.on(whole)
        combine(part, values(part).to(part))
    if sharding.is_divided:
        combine(here, sharding.part(whole))


def recalibrate(
    model: nn.Module,
    masks: Masks,
    batches: Iterable[Any],
    target: str | Target | Callable[[nn.Module, Any], Tensor] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    together: bool = False,
    progress: bool | Progress = False,
) -> Recalibration:
    """How the channels of a dense model have to be scaled and shifted once masks are applied to it.

    Each batch is run once dense, and once for each strength with the masks applied; then the model is as it was, bit for bit, as
    it is if anything fails. Of a model that ``fully_shard`` has divided every process gives its own batches, and each keeps the
    values of its own part meanwhile; moments are summed in the forward, so that the result is that of one process on all batches.

    Experts of a mixture are compared on the tokens that the dense model sends to them, and judged on those that reach them; gates
    of recurrent layers on the dense model's states. Of projections of states, of weights that are scaled before they are used,
    and of those that something else uses as well (tied ones) nothing is known: they keep their scale, and are named in
    ``left_out``.

    Args:
        model: the dense model, see :func:`lrp_prune.attribute`.
        masks: what is to be pruned.
        batches: reference samples, of which the first 16 batches are looked at, or as many as have 256 samples.
        target: what is explained, which tells how outputs are compared: by the Kullback-Leibler divergence where they are
            choices, else by squares. A function of model and batch is run in the model's place, and its values are compared.
            None: it is inferred from the model and its first batch, as :func:`lrp_prune.attribute` does; by squares (``""``)
            where that cannot be told, and the log says why.
        strengths: what to try beside nothing.
        together: whether all processes of a run do this at the same time, each with a whole model and batches of its own, for one
            result. Those that a model is divided among do in any case.
        progress: show a progress bar, or what shows another.

    Raises:
        ValueError: there is no batch, a batch does not fit the model, the model is divided in another way than by
            ``fully_shard``, or none of its outputs can be compared, as their shapes depend on values.
        RuntimeError: another process has an error; or parameters were gathered in inference mode before.
        FloatingPointError: the dense model's output is not finite.

    Example:
        >>> import lrp_prune
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> batches = [(torch.randn(64, 16), torch.randint(4, (64,))) for _ in range(4)]
        >>> masks = lrp_prune.select(lrp_prune.attribute(model, batches), sparsity=0.8)
        >>> recalibration = recalibrate(model, masks, batches)
        >>> masks.apply_(model)
        >>> recalibration.apply_(model)
        >>> recalibration.strength
        1.0
    """
    subject = subject_of(model)
    module = subject.module
    target = subject.own_target if subject.own_target is not None and not callable(target) else target
    divided = bool(shardings_of(module))  # or refused, where they are divided in another way
    mesh = mesh_of(module) if divided else None
    device = next(module.parameters()).device if mesh is None else device_of(mesh)
    processes = Processes(mesh, in_step=divided) if mesh is not None or not together else Processes.of_run(device)
    with processes.agreeing():
        fitted, judged = parts_of_reference(enough(batches))
    target = comparing_by(module, fitted[0], target, processes, mesh, device)
    candidates = [Candidate(strength) for strength in (0.0, *strengths)]
    shown = progress if callable(progress) else bar if progress else no_bar
    with shown("Recalibrating", len(fitted) * len(candidates) + len(judged) * (1 + len(candidates))) as advance:
        biases = {name: masks.whole(name).to(device) for name, shape in masks.shapes.items() if len(shape) == 1}
        runs = Runs(module, masks, target, processes, device, advance, biases=biases)
        runs.fit(fitted, candidates[1:])
        runs.judge(judged, candidates)
    result = _best(candidates, processes, runs.biases)
    known = [place for place, moments in candidates[-1].channels.items() if moments.told]
    fitted_to = {entry.name for place in known for entry in (place, *place.also)}
    pruned = [name for name in masks if masks.pruned_in(name) and name not in fitted_to]
    result.left_out = {name: _reason(runs.seen.get(name), name in runs.uneven) for name in pruned}
    return result


def _reason(tied: bool | None, uneven: bool) -> str:
    """Why a weight is not scaled.

    Args:
        tied: whether something else uses it as well; None if it has no channels.
        uneven: whether its outputs had another shape than the dense ones.
    """
    if tied is None:
        return "is in no product of which each output channel could be scaled by it alone"
    if uneven and not tied:
        return "gives outputs of another shape once masks are applied, as shapes depend on values"
    return "is used by something else as well" if tied else "is reached by fewer than 16 samples or tokens"


def enough(batches: Iterable[Any]) -> list[Any]:
    """The first batches, as many as are looked at.

    Two numbers for each channel take no more than some thousand tokens; what there is beyond that costs time.
    """
    found: list[Any] = []
    samples = 0
    for batch in batches:
        found.append(batch)
        samples += samples_in(batch)
        if len(found) >= LOOKED_AT and samples >= _SAMPLES:
            break
    return found


def parts_of_reference(batches: list[Any]) -> tuple[list[Any], list[Any]]:
    """Batches to fit scales to, and others to judge them by: a quarter; of a single batch both are made."""
    if not batches:
        raise ValueError("no batch was seen: recalibration needs at least one reference sample")
    if len(batches) == 1:
        return batches, batches
    number = max(len(batches) // 4, 1)
    return batches[:-number], batches[-number:]


def _best(candidates: list[Candidate], processes: Processes, biases: Mapping[str, Tensor]) -> Recalibration:
    """The strength whose outputs are closest on batches that it was not fitted to."""
    judged = _divergences(candidates, processes)
    finite = {strength: value for strength, value in judged.items() if math.isfinite(value)}
    strength = min(finite, key=lambda entry: (finite[entry], entry)) if finite else 0.0
    chosen = next(candidate for candidate in candidates if candidate.strength == strength)
    result = Recalibration(strength, judged)
    for place, moments in chosen.channels.items() if strength else ():
        if moments.told:
            result.scales[place], shift = moments.fit(strength, shifted_in(place.bias, biases))
            if place.bias is not None:
                result.shifts[place] = shift
    result.normalizations = {name: moments.change() for name, moments in chosen.norms.items() if moments.told}
    return result


class IncomparableError(ValueError):
    """No output of the dense model can be compared with what it is after pruning."""


def _divergences(candidates: list[Candidate], processes: Processes) -> dict[float, float]:
    """The distance from the dense model by strength, of those outputs that can be compared at each of them.

    Raises:
        IncomparableError: if there is none.
    """
    batches: list[tuple[float, ...]] = []
    left_out: set[str] = set()
    for theirs in processes.gathered([candidate.distances for candidate in candidates]):
        for batch in zip(*theirs, strict=True):
            outputs = list(zip(*batch, strict=True))  # each with its distance at each strength
            compared = [output for output in outputs if None not in output]
            left_out |= {f"{index + 1} of {len(outputs)}" for index, output in enumerate(outputs) if None in output}
            if compared:
                batches.append(tuple(map(sum, zip(*compared, strict=True))))
    if not batches:
        raise IncomparableError(
            "nothing that the dense model gives can be compared with what it gives once masks are applied, since shapes or the "
            "number of outputs depend on values: pass recalibrate=False, or a method with a function as its target, whose values "
            "are compared then"
        )
    if left_out and is_first():
        _logger.info("recalibration does not compare output %s: shapes depend on values", ", ".join(sorted(left_out)))
    means = (sum(column) / len(batches) for column in zip(*batches, strict=True))
    return {candidate.strength: mean for candidate, mean in zip(candidates, means, strict=True)}
