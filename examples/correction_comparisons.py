"""What a correction is compared with: random weights, small weights, and neurons by their activation."""

from collections.abc import Callable, Iterator, Sequence

import torch
from correction_study import IGNORED, Batch, Result, Study
from torch import Tensor, nn

from lrp_prune import Patch
from lrp_prune.models import run, subject_of
from lrp_prune.names import named_parameters


def random_patch(model: nn.Module, names: Sequence[str], count: int, seed: int) -> Patch:
    """A patch of `count` entries drawn from all entries of the named parameters."""
    parameters = named_parameters(model)
    sizes = [parameters[name].numel() for name in names]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(sum(sizes), (round(1.02 * count) + 50,), generator=generator).unique()
    flat = chosen[torch.randperm(len(chosen), generator=generator)[:count]]
    positions, begin = {}, 0
    for name, size in zip(names, sizes, strict=True):
        here = flat[(flat >= begin) & (flat < begin + size)] - begin
        if len(here):
            positions[name] = here
        begin += size
    return Patch.from_positions(model, positions, behaviour="none, chosen at random", seed=seed)


def magnitude_patch(model: nn.Module, names: Sequence[str], count: int) -> Patch:
    """A patch of the `count` entries that are the smallest, each compared within its parameter as pruning does."""
    parameters = named_parameters(model)
    share = count / sum(parameters[name].numel() for name in names)
    positions = {}
    for name in names:
        size = parameters[name].detach().abs().reshape(-1)
        k = min(max(round(share * size.numel()), 1), size.numel())
        positions[name] = size.topk(k, largest=False).indices
    return Patch.from_positions(model, positions, behaviour="none, smallest magnitude")


@torch.inference_mode()
def mean_activations(model: nn.Module, reference: Sequence[Batch], names: Sequence[str]) -> dict[str, Tensor]:
    """The mean input `[units]` of each named weight's layer over labelled tokens: what its neurons say on these texts."""
    module = subject_of(model).module
    layers = {name: module.get_submodule(name.removesuffix(".weight")) for name in names}
    totals: dict[str, Tensor] = {}
    counted: Tensor
    handles = []
    for name, layer in layers.items():

        def add(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            totals[name] = totals.get(name, torch.zeros(())) + inputs[0][counted].double().sum(0)

        handles.append(layer.register_forward_pre_hook(add))
    tokens = 0
    try:
        for batch in reference:
            # The first position is a sink of attention whose activations dwarf all others.
            counted = batch["labels"] != IGNORED
            counted[:, 0] = False
            tokens += int(counted.sum())
            run(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / tokens for name, total in totals.items()}


def activation_patch(model: nn.Module, general: dict[str, Tensor], undesired: dict[str, Tensor], count: int) -> Patch:
    """A patch of the neurons whose mean activation differs most, `count` entries of what they contribute."""
    parameters = named_parameters(model)
    names = list(general)
    difference = torch.cat([(undesired[name] - general[name]).abs() for name in names])
    rows = parameters[names[0]].shape[0]
    chosen = difference.topk(min(max(count // rows, 1), len(difference))).indices
    positions, begin = {}, 0
    for name in names:
        width = parameters[name].shape[1]
        units = chosen[(chosen >= begin) & (chosen < begin + width)] - begin
        if len(units):
            mask = torch.zeros(parameters[name].shape, dtype=torch.bool)
            mask[:, units] = True
            positions[name] = mask
        begin += width
    return Patch.from_positions(model, positions, behaviour="activation contrast")


def comparisons(
    study: Study,
    names: Sequence[str],
    activations: Callable[[int], Patch],
    count: int,
    strength: float,
    allowed: float,
    seeds: int,
) -> Iterator[tuple[str, Result]]:
    """Measures what else could have been changed: as many entries as strongly, or what is removed at the cost that is allowed.

    Args:
        study: What measures.
        names: The parameters to choose from.
        activations: From a count to the patch by activations.
        count: Entries of the correction.
        strength: Of the correction.
        allowed: The cost.
        seeds: Of random entries.
    """
    model = study.model
    for seed in range(seeds):
        yield "random, same number", study.measure(random_patch(model, names, count, seed), strength)
    first = study.at_cost(lambda k: random_patch(model, names, k, 0), 20 * count, allowed)
    if first is not None:
        yield "random, same cost", first
        for seed in range(1, seeds):
            yield "random, same cost", study.measure(random_patch(model, names, first.entries, seed))
    # Small weights matter so little that it takes very many of them to cost anything.
    makers = {"magnitude": (lambda k: magnitude_patch(model, names, k), 100), "activation contrast": (activations, 1)}
    for name, (make, factor) in makers.items():
        equal = study.at_cost(make, factor * count, allowed)
        if equal is not None:
            yield f"{name}, same cost", equal
        else:  # the least there is costs more than is allowed
            yield f"{name}, least", study.measure(make(1))
