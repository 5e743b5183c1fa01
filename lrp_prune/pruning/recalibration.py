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

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lrp_prune.models.batches import laid_together, samples_in, to_device
from lrp_prune.models.padding import counted_tokens
from lrp_prune.models.subject import subject_of
from lrp_prune.names import named_modules, named_parameters
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.moments import PairedMoments
from lrp_prune.pruning.pairs import DenseOutputs, Place, PrunedUses
from lrp_prune.pruning.passes import Normalization, divergence, normalizing, outputs_of
from lrp_prune.sharding import is_sharded
from lrp_prune.targets import Target

STRENGTHS = (0.5, 1.0)
"""How much of the least squares is tried, beside nothing."""

_ENTRIES = 1 << 28
"""Entries of layers' outputs that are kept at a time, of the dense model: 1 GB in float32."""

_BATCHES, _SAMPLES = 16, 256
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
    """

    strength: float
    divergences: dict[float, float]
    scales: dict[Place, Tensor] = field(default_factory=dict, repr=False)
    shifts: dict[Place, Tensor] = field(default_factory=dict, repr=False)
    normalizations: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        tried = ", ".join(f"{strength:g}: {value:.4g}" for strength, value in sorted(self.divergences.items()))
        done = f"at strength {self.strength:g}" if self.strength else "not recalibrated"
        return f"{done} (divergence from the dense model by strength: {tried})"

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters that it changes."""
        biases = [place.bias.name for place in self.scales if place.bias is not None]
        return list(dict.fromkeys([*(place.name for place in self.scales), *biases]))

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Change a model in place, to which the masks have been applied."""
        parameters, modules = named_parameters(model), named_modules(model)
        for place, scale in self.scales.items():
            weight = parameters[place.name].detach()
            part = place.layout.on(weight)
            part.mul_(place.along_weight(scale, part).to(part))
            if place.bias is not None:
                bias = place.bias.layout.on(parameters[place.bias.name].detach())
                bias.mul_(scale.to(bias)).add_(self.shifts[place].to(bias))
        for name, (moved, factor) in self.normalizations.items():
            module = modules[name]
            assert isinstance(module, Normalization)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.add_(moved.to(module.running_mean))
            module.running_var.mul_(factor.to(module.running_var))


class _Candidate:
    """One strength: its moments so far, and how far its outputs were from the dense ones."""

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.channels: dict[Place, PairedMoments] = {}
        self.norms: dict[str, PairedMoments] = {}
        self.divergences: list[float] = []

    def normalized(self, name: str, x: Tensor, dense: Tensor | None, fitting: bool) -> tuple[Tensor, Tensor] | None:
        """How the statistics of a batch normalization have to move for what it gets."""
        if self.strength == 0:
            return None
        if fitting and dense is not None and dense.shape == x.shape:
            self.norms.setdefault(name, PairedMoments(x.shape[1])).add(_by_place(x), _by_place(dense))
        return self.norms[name].change() if name in self.norms else None

    def take_together(self) -> None:
        """Add what the other processes have."""
        for table in (self.channels, self.norms):
            everyone = _gathered({name: moments.state() for name, moments in table.items()})
            if len(everyone) == 1:
                continue
            rank = torch.distributed.get_rank()
            for name in dict.fromkeys(name for theirs in everyone for name in theirs):
                states = [theirs[name] for number, theirs in enumerate(everyone) if name in theirs and number != rank]
                if states:
                    table.setdefault(name, PairedMoments(states[0].shape[1])).merge(states)


def recalibrate(
    model: nn.Module,
    masks: Masks,
    batches: Iterable[Any],
    target: str | Target | Callable[[nn.Module, Any], Tensor] = "",
    strengths: Sequence[float] = STRENGTHS,
    together: bool = False,
) -> Recalibration:
    """How the channels of a dense model have to be scaled and shifted once masks are applied to it.

    Each batch is run once dense, and once for each strength with masks in the products; the model itself stays as it is. Of
    layers whose outputs are of other tokens when pruned (experts with a router), of recurrent steps, of weights that are
    scaled before they are used, and of those that something else uses as well (tied ones), nothing is known: they keep their
    scale.

    Args:
        model: the dense model, see :func:`lrp_prune.attribute`.
        masks: what is to be pruned.
        batches: reference samples, of which the first 16 batches are looked at, or as many as have 256 samples.
        target: what is explained, which tells how outputs are compared: by the Kullback-Leibler divergence where they are
            choices, else by squares. A function of model and batch is run in the model's place, and its values are compared.
        strengths: what to try beside nothing.
        together: whether all processes of a run do this at the same time, each on batches of its own, for one result.

    Raises:
        ValueError: there is no batch, or a batch does not fit the model.
        FloatingPointError: the dense model's output is not finite.

    Example:
        >>> import lrp_prune
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> batches = [(torch.randn(64, 16), torch.randint(4, (64,))) for _ in range(4)]
        >>> masks = lrp_prune.select(lrp_prune.attribute(model, batches), sparsity=0.8)
        >>> recalibration = recalibrate(model, masks, batches, "class")
        >>> masks.apply_(model)
        >>> recalibration.apply_(model)
        >>> recalibration.strength
        1.0
    """
    subject = subject_of(model)
    module = subject.module
    target = subject.own_target if subject.own_target is not None and not callable(target) else target
    if any(map(is_sharded, module.parameters())):
        warnings.warn("models that are divided among processes are not recalibrated yet", UserWarning, stacklevel=2)
        return Recalibration(0.0, {})
    fitted, judged = _parts(enough(batches))
    candidates = [_Candidate(strength) for strength in (0.0, *strengths)]
    for group in _groups(module, fitted, masks, target):
        _compare(module, masks, group, candidates[1:], target, fitting=True)
    for candidate in candidates if together else ():
        candidate.take_together()
    for batch in judged:
        _compare(module, masks, batch, candidates, target, fitting=False)
    return _best(candidates, together)


def enough(batches: Iterable[Any]) -> list[Any]:
    """The first batches, as many as are looked at.

    Two numbers for each channel take no more than some thousand tokens; what there is beyond that costs time.
    """
    found: list[Any] = []
    samples = 0
    for batch in batches:
        found.append(batch)
        samples += samples_in(batch)
        if len(found) >= _BATCHES and samples >= _SAMPLES:
            break
    return found


def _parts(batches: list[Any]) -> tuple[list[Any], list[Any]]:
    """Batches to fit scales to, and others to judge them by: a quarter; of a single batch both are made."""
    if not batches:
        raise ValueError("no batch was seen: recalibration needs at least one reference sample")
    if len(batches) == 1:
        return batches, batches
    number = max(len(batches) // 4, 1)
    return batches[:-number], batches[-number:]


def _groups(module: nn.Module, batches: list[Any], masks: Masks, target: Any) -> Iterator[Any]:
    """Batches laid together to as few as memory allows: what a layer gets depends on the scales of those before.

    Fitted batch by batch, the scales of one layer would be changed again when the next have been fitted to them; deep networks
    with batch normalization amplify that. So as many as possible are run as one.
    """
    size: int | None = None
    while batches:
        if size is None:
            uses = DenseOutputs(masks, None)
            outputs_of(module, batches[0], uses, target)
            size = max(1, _ENTRIES // max(uses.entries, 1))
        together, number = batches[0], 1
        for batch in batches[1:size]:
            both = laid_together(together, batch)
            if both is None:
                break
            together, number = both, number + 1
        batches = batches[number:]
        yield together


def _compare(
    module: nn.Module, masks: Masks, batch: Any, candidates: Sequence[_Candidate], target: Any, fitting: bool
) -> None:
    """Run a batch dense, and as each candidate would have it: to fit scales to it, or to judge by it those that are known."""
    batch = to_device(batch, next(module.parameters()).device)
    counted = counted_tokens(module, batch, 0)
    dense = DenseOutputs(masks, counted)
    norms: dict[str, list[Tensor]] = {}

    def kept(name: str, x: Tensor) -> None:
        norms.setdefault(name, []).append(x.detach())

    with normalizing(module, kept):
        expected = outputs_of(module, batch, dense, target)
    if not all(bool(torch.isfinite(entry).all()) for entry in expected):
        raise FloatingPointError("the dense model's output is not finite: check the batches and the precision")
    for candidate in candidates:
        uses = PrunedUses(masks, dense, candidate.channels, candidate.strength, counted, fitting)
        inputs = {name: iter(values) for name, values in norms.items()}

        def moved(name: str, x: Tensor, candidate: _Candidate = candidate, inputs: Any = inputs) -> Any:
            return candidate.normalized(name, x, next(inputs.get(name, iter(())), None), fitting)

        with normalizing(module, moved):
            found = outputs_of(module, batch, uses, target)
        if not fitting:
            candidate.divergences.append(divergence(expected, found, target, counted))


def _by_place(x: Tensor) -> Tensor:
    return x.detach().movedim(1, -1).reshape(-1, x.shape[1])


def _best(candidates: list[_Candidate], together: bool) -> Recalibration:
    """The strength whose outputs are closest on batches that it was not fitted to."""
    judged = {candidate.strength: _mean(candidate.divergences, together) for candidate in candidates}
    finite = {strength: value for strength, value in judged.items() if math.isfinite(value)}
    strength = min(finite, key=lambda entry: (finite[entry], entry)) if finite else 0.0
    chosen = next(candidate for candidate in candidates if candidate.strength == strength)
    result = Recalibration(strength, judged)
    for place, moments in chosen.channels.items() if strength else ():
        if moments.count:
            result.scales[place], shift = moments.fit(strength, place.bias is not None)
            if place.bias is not None:
                result.shifts[place] = shift
    result.normalizations = {name: moments.change() for name, moments in chosen.norms.items() if moments.count}
    return result


def _mean(values: Sequence[float], together: bool) -> float:
    everyone = _gathered(list(values)) if together else [values]
    flat = [value for theirs in everyone for value in theirs]
    return float(sum(flat) / max(len(flat), 1))


def _gathered(value: Any) -> list[Any]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, value)
    return everyone
