r"""Ablation: the contributions of some units are replaced while a model runs, and nothing remains afterwards.

With the gate :math:`z \in [0, 1]` of a unit (1: kept) its activation becomes :math:`z a + (1 - z) r`. The replacement ``r`` is

==================  ==========================================================================================
``counterfactual``  the unit's activation in the counterfactual prompt, position by position (interchange)
``mean``            its mean over samples and positions of counterfactual prompts
``zero``            nothing
==================  ==========================================================================================

Only contributions are replaced, never the residual stream: a closed block leaves what came before it untouched.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lrp_prune.circuits.sites import NOT_ALIGNED, PARENTS, Site, passing
from lrp_prune.names import named_modules, named_parameters

Ablation = Literal["counterfactual", "mean", "zero"]
ABLATIONS: tuple[str, ...] = get_args(Ablation)
Place = tuple[str, bool]
"""A module's canonical name, and whether its output is meant (else its input)."""
Reference = Mapping[Place, Sequence[Tensor]]
"""Replacement activations at places: one tensor for each call of the module in a forward."""


def check_ablation(ablation: str) -> None:
    """Refuse an unknown ablation."""
    if ablation not in ABLATIONS:
        raise ValueError(f"ablation must be one of {ABLATIONS}, got {ablation!r}")


def _hooked(
    modules: Mapping[str, nn.Module], place: Place, change: Callable[[Tensor, int], Tensor]
) -> Callable[[], None]:
    """Change the tensor that goes into or comes out of a module; ``change`` also gets the number of the call."""
    calls = [0]
    name, at_output = place

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        calls[0] += 1
        if not args:
            raise ValueError(f"{name} is called with its input by keyword: circuits know inputs given by position only")
        return (change(args[0], calls[0] - 1), *args[1:])

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        calls[0] += 1
        if isinstance(output, tuple):
            return (change(output[0], calls[0] - 1), *output[1:])
        return change(output, calls[0] - 1)

    if name not in modules:
        raise ValueError(f"the model has no module {name!r}: was the circuit made for another model?")
    module = modules[name]
    handle = module.register_forward_hook(after) if at_output else module.register_forward_pre_hook(before)
    remove: Callable[[], None] = handle.remove
    return remove


def places(sites: Iterable[Site]) -> list[Place]:
    """Module and whether at its output, once for each place where units are switched."""
    return list(dict.fromkeys((site.module, site.at_output) for site in sites))


@contextmanager
def capturing(
    model: nn.Module, where: Iterable[Place], keep: Callable[[Tensor], Tensor] = Tensor.detach
) -> Iterator[dict[Place, list[Tensor]]]:
    """Note the activations at some places during one forward.

    A module's output may be added to in place by what comes after it (the residual stream of Falcon is): there a copy is
    noted, or handed on.

    Args:
        model: the module whose modules the places name.
        where: the places.
        keep: what is noted and handed on; with ``Tensor.detach`` the forward goes on with the tensor itself.
    """
    noted: dict[Place, list[Tensor]] = {place: [] for place in where}
    modules = named_modules(model)
    with ExitStack() as stack:
        for place in noted:

            def change(tensor: Tensor, call: int, place: Place = place) -> Tensor:
                kept, at_output = keep(tensor), place[1]
                if keep is Tensor.detach:
                    noted[place].append(kept.clone() if at_output else kept)
                    return tensor
                noted[place].append(kept)
                return kept.clone() if at_output else kept

            stack.callback(_hooked(modules, place, change))
        yield noted


@contextmanager
def replacing(model: nn.Module, gates: Mapping[Place, Tensor], reference: Reference | None) -> Iterator[None]:
    """Replace activations at places by :math:`z a + (1 - z) r` during one forward.

    Args:
        model: the module whose modules the places name.
        gates: place -> what broadcasts with the activation's channels.
        reference: place -> replacement; None for zeros.
    """
    modules = named_modules(model)
    with ExitStack() as stack:
        for place, gate in gates.items():
            replacements = None if reference is None else reference[place]
            if replacements is not None and not replacements:
                raise ValueError(NOT_ALIGNED.format(name=place[0]))

            def change(
                tensor: Tensor,
                call: int,
                place: Place = place,
                gate: Tensor = gate,
                replacements: Sequence[Tensor] | None = replacements,
            ) -> Tensor:
                # In half precision the two parts would add up to something else where the replacement is the same.
                wide = torch.promote_types(tensor.dtype, torch.float32)
                gate = gate.to(tensor.device, wide)
                kept = gate * tensor.to(wide)
                if replacements is None:
                    return kept.to(tensor.dtype)
                replacement = replacements[call % len(replacements)].to(tensor.device, wide)
                if replacement.dim() > 1 and replacement.shape != tensor.shape:
                    raise ValueError(NOT_ALIGNED.format(name=place[0]))
                return (kept + (1 - gate) * replacement).to(tensor.dtype)

            stack.callback(_hooked(modules, place, change))
        yield


@contextmanager
def gating(
    model: nn.Module, sites: Iterable[Site], gates: Mapping[str, Tensor], reference: Reference | None
) -> Iterator[None]:
    """Ablate units by their gates during one forward.

    Args:
        model: the module whose modules the sites name.
        sites: the units.
        gates: name of a site -> ``[units]``, bool or in [0, 1]; sites without gates, and those whose bools are all True,
            are left alone.
        reference: replacement activations; None for zeros.

    Raises:
        ValueError: if gates do not have their site's shape, or the model lacks a module.
    """
    together: dict[Place, Tensor] = {}
    for site in sites:
        gate = gates.get(site.name)
        if gate is None or (gate.dtype == torch.bool and bool(gate.all())):
            continue
        if gate.shape != (site.units,):
            raise ValueError(f"the gates of {site.name} have shape {tuple(gate.shape)}, expected ({site.units},)")
        # A block's one gate spreads over all channels of its output by broadcasting.
        spread = gate if site.at_output or site.width == 1 else gate.repeat_interleave(site.width)
        place = (site.module, site.at_output)
        together[place] = spread if place not in together else together[place] * spread
    with replacing(model, together, reference):
        yield


def counterfactual_reference(run: Callable[[], Any], model: nn.Module, sites: Iterable[Site]) -> Reference:
    """The activations at the sites in the forward that ``run`` does."""
    with passing(model), capturing(model, places(sites)) as noted:
        run()
    return noted


def mean_reference(runs: Iterable[Callable[[], Any]], model: nn.Module, sites: Sequence[Site]) -> Reference:
    """The mean activation of each channel over samples and positions of several forwards.

    Raises:
        ValueError: if there is no forward.
    """
    sums: dict[Place, list[Tensor]] = {}
    rows: dict[Place, list[int]] = {}
    for run in runs:
        for place, tensors in counterfactual_reference(run, model, sites).items():
            flat = [tensor.reshape(-1, tensor.shape[-1]).double() for tensor in tensors]
            if len(sums.setdefault(place, [tensor.new_zeros(tensor.shape[1]) for tensor in flat])) != len(flat):
                raise ValueError(NOT_ALIGNED.format(name=place[0]))
            sums[place] = [total + tensor.sum(0) for total, tensor in zip(sums[place], flat, strict=True)]
            counts = rows.setdefault(place, [0] * len(flat))
            rows[place] = [count + len(tensor) for count, tensor in zip(counts, flat, strict=True)]
    if not sums:
        raise ValueError("mean ablation needs at least one batch of prompts")
    return {
        place: [total / count for total, count in zip(totals, rows[place], strict=True)]
        for place, totals in sums.items()
    }


@contextmanager
def weights_zeroed(model: nn.Module, kept: Mapping[str, Tensor]) -> Iterator[None]:
    """Set weights to zero for the time of the context; the very same values are back afterwards.

    Args:
        model: the module.
        kept: canonical parameter name -> bool of its shape, False is set to zero.
    """
    parameters = named_parameters(model)
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for name, mask in kept.items():
                if not bool(mask.all()):
                    before.append((parameters[name], parameters[name].detach().clone()))
                    parameters[name].masked_fill_(~mask.to(parameters[name].device), 0.0)
        torch.clear_autocast_cache()  # it may hold copies of the weights as they were
        yield
    finally:
        with torch.no_grad():
            for parameter, values in before:
                parameter.copy_(values)
        torch.clear_autocast_cache()


def effective(sites: Sequence[Site], gates: Mapping[str, Tensor], detach: bool = False) -> dict[str, Tensor]:
    r"""Each unit's gate times those of the units that contain it (its head, its block): what really passes.

    Args:
        sites: the units.
        gates: name of a site -> ``[units]``.
        detach: count what contains a unit as a constant, so that a penalty on units does not move blocks.
    """
    by_place = {(site.kind, site.module): site for site in sites if site.name in gates}
    result = {}
    for site in sites:
        if site.name not in gates:
            continue
        value = gates[site.name]
        for kind in PARENTS.get(site.kind, ()):
            parent = by_place.get((kind, site.module))
            if parent is not None:
                factor = gates[parent.name].detach() if detach else gates[parent.name]
                value = value * factor.repeat_interleave(site.units // parent.units)
        result[site.name] = value
    return result
