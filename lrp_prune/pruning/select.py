"""From relevance to masks: exactly the asked share of what is compared, the least relevant first."""

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrp_prune.pruning.coverage import Group, groups_of, tell_unscored
from lrp_prune.pruning.emptied import tell_emptied, tell_rounded_away
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.scope import Scope, scope_of
from lrp_prune.pruning.units import existing_units, expand_units
from lrp_prune.relevance.members import stacked_layers
from lrp_prune.relevance.unscored import patterns_of, tell_nothing
from lrp_prune.selection import bits
from lrp_prune.selection.floors import limits_of, resolved_floor, within_limits
from lrp_prune.selection.keys import CHUNK, DEVICE_CHUNK
from lrp_prune.selection.rows import smallest_per_row
from lrp_prune.selection.scopes import (
    Structure,
    as_rows,
    check_reachable,
    check_selectable,
    check_units_scope,
    layout_of,
    number_to_prune,
    parse_scope,
)
from lrp_prune.selection.together import ChosenTogether, raise_together, rows_together, smallest_of

if TYPE_CHECKING:
    from lrp_prune.relevance import Relevance


def select(
    relevance: "Relevance",
    sparsity: float | Mapping[str, float] = 0.5,
    scope: str | Scope = "global",
    *,
    existing: Masks | None = None,
) -> Masks:
    r"""Mask the least relevant weights or units.

    Of the :math:`n` entries of each comparison set exactly :math:`\mathrm{round}(s n)` are pruned: those with the
    smallest :math:`|R|` (order ``"absolute"``) or :math:`R` (``"signed"``, the most negative first), equal ones by
    position. A set is what ``scope`` says.

    :math:`n` counts all weights that were asked for, also those that could not be scored (``relevance.unscored``). With scope
    ``"global"`` the scored ones make up for these: exactly :math:`\mathrm{round}(s n)` are pruned. Any other scope leaves
    unscored tensors dense, and is refused where they are more than 5 % of the weights. Either way a warning names them; they
    are in the masks, all kept, so that ``masks.sparsity`` is of everything that was asked for, and in ``masks.unscored``.

    With scope ``"global"`` each tensor of weights keeps at least the share ``floor`` (of :class:`Scope`) of what it would keep if
    all were pruned
    alike: where :math:`k` of :math:`N` scored weights are pruned, at most :math:`\lceil n (1 - f (1 - k / N)) \rceil` of a tensor
    with :math:`n` are, and :math:`k` of all together as ever. What comes first in the ranking is pruned, past tensors that are
    at their limit (of sets with patterns, each has a :math:`k / N` of its own).

    Args:
        relevance: values of weights in their parameters' shapes, or of units ``[units]`` by group.
        sparsity: total fraction to prune, in [0, 1); or ``{pattern: fraction}``: tensors of one pattern are selected
            together, a tensor belongs to the first pattern that matches its name (one that is a tensor's name means this one
            alone), and one that none matches gets no mask.
        scope: what is compared: ``"global"`` (all tensors), ``"layer"`` (one tensor), ``"row"`` (the inputs of one
            output), ``"column"`` (the outputs of one input), or ``"N:M"`` (of M consecutive inputs N are kept; ``"N:8"``: as
            many as the tensor's sparsity says); or a :class:`Scope`, which also has the floor, the order and the normalization.
            Units are compared ``"global"`` or by ``"layer"`` (one group; each expert of a stack by itself). Optional
            ``relevance.layouts`` (name to one of :data:`lrp_prune.selection.scopes.LAYOUTS`) says where a parameter has its
            outputs; else its shape does.
        existing: masks of earlier rounds: what they prune stays pruned and counts. Masks of parameters that are not
            selected here are taken over, and what they prune beyond a tensor's ``floor`` is not given back.

    Units of several kinds (``granularity=["head", "neuron"]``) are selected kind by kind, each to the sparsity asked for:
    ``{"head:*": 0.2, "neuron:*": 0.4}`` gives each its own.

    Relevance of a sharded model is selected from by all its processes together, and the masks are divided as it is: the
    same as in one process, whatever the number of processes, up to scores that tie within rounding.

    Tensors that lose more than 95 % where less was asked for are named in a warning
    (:class:`~lrp_prune.pruning.EmptiedWeightsWarning`).

    Returns:
        Masks of the selected parameters, and of those in ``existing``.

    Raises:
        ValueError: if an argument is out of range, a pattern matches nothing or only unscored weights, the sparsity cannot be
            reached with what is scored or by the scope, the scope or floor does not fit the granularity or a shape, a value is
            infinite or NaN, or ``existing`` prunes more than asked already.

    Example:
        >>> from lrp_prune.relevance import Relevance
        >>> values = torch.tensor([[1.0, -3.0, 2.0, 0.0], [7.0, 8.0, -5.0, 6.0]])
        >>> relevance = Relevance({"weight": values}, statistic="signed")
        >>> select(relevance, sparsity=0.5)["weight"]
        tensor([[False, False, False, False],
                [ True,  True,  True,  True]])
        >>> select(relevance, sparsity=0.5, scope="row")["weight"]
        tensor([[False,  True,  True, False],
                [ True,  True, False, False]])
        >>> relevance = Relevance({"first": values[0], "second": values[1]}, statistic="signed")
        >>> for floor in (0.0, 0.5, 1.0):
        ...     masks = select(relevance, 0.5, Scope(floor=floor))
        ...     masks.pruned_in("first"), masks.pruned_in("second")
        (4, 0)
        (3, 1)
        (2, 2)
    """
    asked = scope_of(scope)
    compared = asked.compared or "global"
    parsed = parse_scope(compared)
    if not len(relevance):
        raise ValueError("the relevance holds no tensor: was everything excluded?")
    floor = resolved_floor(asked.floor, compared, relevance.granularity)
    existing = existing.divided(dict(relevance.shardings)) if existing is not None else None
    groups = groups_of(relevance, sparsity, parsed, existing)
    for group in groups:
        check_reachable(parsed, group.rate)
    if asked.normalize is not None:
        relevance = relevance.normalized(asked.normalize)
    shardings = dict(relevance.shardings)
    unscored: dict[str, str] = {}
    if relevance.granularity == "weight":
        shapes = {
            name: tuple(relevance.parameter_shapes[name])
            for group in groups
            for name in (*group.scored, *group.unscored)
        }
        _check_shapes(shapes, existing)
        kept = {name: existing.bits(name) for name in shapes if name in existing} if existing is not None else {}
        before = {name: existing.pruned_in(name) for name in kept} if existing is not None else {}
        chosen = _select_weights(relevance, groups, parsed, asked.order, shapes, kept, floor, before)
        for name, reason in (entry for group in groups for entry in group.unscored.items()):
            chosen[name] = kept[name] if name in kept else _all_kept(relevance, name)
            if existing is None or name not in existing or name in existing.unscored:
                unscored[name] = reason
        chosen = {name: chosen[name] for name in relevance.parameter_shapes if name in chosen}
    else:
        check_units_scope(relevance.granularity, compared)
        units = {name: (math.prod(relevance[name].shape),) for group in groups for name in group.scored}
        _check_shapes(relevance.parameter_shapes, existing)
        kept = existing_units(relevance, units, existing)
        chosen = _select_weights(relevance, groups, parsed, asked.order, units, kept)
        each = {
            name: size // (1 if parsed == "global" else _layers(relevance, name)) for name, (size,) in units.items()
        }
        tell_rounded_away(relevance, groups, each, parsed == "global")
        shapes, chosen = expand_units(relevance, chosen, existing)
    if existing is not None:
        for name in existing:
            if name not in chosen:
                chosen[name], shapes[name] = existing.bits(name), existing.shapes[name]
                unscored.update({name: existing.unscored[name]} if name in existing.unscored else {})
                shardings.update({name: existing.shardings[name]} if name in existing.shardings else {})
    granularity = relevance.granularity
    layouts = {**(existing.layouts if existing is not None else {}), **relevance.layouts}
    masks = Masks.from_bits(
        chosen, shapes, granularity=granularity, shardings=shardings, unscored=unscored, layouts=layouts
    )
    tell_nothing(relevance, stacklevel=3)
    tell_unscored(groups, relevance, masks)
    tell_emptied(groups, masks, existing, compared)
    return masks


def check_selection(
    relevance: "Relevance", sparsity: float | Mapping[str, float], scope: str | Scope = "global"
) -> None:
    """Refuse what :func:`select` would refuse whatever the values are, and whatever of them is scored.

    Raises:
        ValueError: a pattern matches nothing, or the scope does not fit the granularity, the sparsity or a weight's shape.

    Example:
        >>> from lrp_prune.relevance import Relevance
        >>> check_selection(Relevance({"weight": torch.ones(2, 4)}, statistic="signed"), 0.75, "2:4")
        Traceback (most recent call last):
        ...
        ValueError: sparsity 0.75 is unreachable with scope '2:4', which prunes exactly 0.5: use sparsity=0.5 or another scope
    """
    compared = scope_of(scope).compared or "global"
    if relevance.granularity != "weight":
        check_selectable(dict.fromkeys(relevance), {}, sparsity, compared, relevance.granularity)
        return
    shapes = {name: tuple(relevance.parameter_shapes[name]) for name in (*relevance, *relevance.unscored)}
    layouts = _layouts(relevance, shapes, told=False)
    check_selectable({**layouts, **dict.fromkeys(relevance.unscored)}, shapes, sparsity, compared)


def _layouts(relevance: "Relevance", shapes: Mapping[str, tuple[int, ...]], told: bool = True) -> dict[str, str]:
    """What is a row of each weight; where no use told, and no module did, its shape does, and that is said."""
    guessed = {name: layout_of(shape) for name, shape in shapes.items()}
    matrices = [
        name
        for name, layout in guessed.items()
        if layout != "vector" and name in relevance and name not in relevance.layouts
    ]
    if told and relevance.model and matrices:
        examples = ", ".join(f"{name} as {guessed[name]}" for name in matrices[:2])
        warnings.warn(
            f"nothing tells along which dimension {', '.join(patterns_of(matrices))} have their outputs: they are taken for "
            f"layers' by their shapes ({examples}; relevance.layouts can say otherwise). Methods that see a forward, such as "
            "'lrp' and 'wanda', know it of products with one dimension for each; scope='layer' needs it of none",
            stacklevel=4,
        )
    return {name: relevance.layouts.get(name) or layout for name, layout in guessed.items()}


def _all_kept(relevance: "Relevance", name: str) -> Tensor:
    return bits.pack(torch.ones(relevance.sharding_of(name).local_shape, dtype=torch.bool, device="cpu"))


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], existing: Masks | None) -> None:
    for name in existing or ():
        if existing is not None and name in shapes and existing.shapes[name] != tuple(shapes[name]):
            raise ValueError(
                f"the existing mask of {name} has shape {existing.shapes[name]}, its relevance {tuple(shapes[name])}: "
                "was it made for another model?"
            )


def _select_weights(
    relevance: "Relevance",
    groups: Sequence[Group],
    scope: str | Structure,
    order: str,
    shapes: Mapping[str, tuple[int, ...]],
    kept: Mapping[str, Tensor],
    floor: float = 0.0,
    before: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Packed masks of the selected tensors, in the relevance's order."""
    found: dict[str, Tensor] = {}
    failures: list[ValueError] = []
    shardings = {name: relevance.sharding(name) for group in groups for name in group.scored}
    mesh = next((sharding.mesh for sharding in shardings.values() if sharding.is_divided), None)

    def choose_together(names: Sequence[str], k: int) -> ChosenTogether:
        return smallest_of(relevance, names, k, order, kept)

    layouts = {} if scope in ("global", "layer") else _layouts(relevance, shapes)
    for group in groups:
        rate = group.rate
        for together in [group.scored] if scope == "global" else [[name] for name in group.scored]:
            layers = _layers(relevance, together[0]) if scope == "layer" else 1
            if layers > 1:
                (name,) = together
                rows = relevance[name].reshape(layers, -1)
                choose = partial(_select_rows, rate=rate, scope="row", layout="linear", order=order, name=name)
                found[name] = choose(rows, kept.get(name))
            elif scope in ("global", "layer"):
                k = number_to_prune(rate, sum(math.prod(shapes[name]) for name in together))
                if scope == "global" and relevance.granularity == "weight":
                    k = group.number  # also for those that are not scored
                if scope == "global" and floor:
                    limits = limits_of({name: math.prod(shapes[name]) for name in together}, floor, k, before or {})
                    found.update(within_limits(together, k, limits, choose_together))
                else:
                    found.update(choose_together(together, k).masks())
            else:
                (name,) = together
                layout = layouts[name]
                choose = partial(_select_rows, rate=rate, scope=scope, layout=layout, order=order, name=name)
                found[name] = rows_together(relevance, name, scope, layout, kept.get(name), choose, failures)
    raise_together(failures, mesh)
    return {name: found[name] for name in relevance if name in found}


def _layers(relevance: "Relevance", name: str) -> int:
    """How many layers a group of units is of; where processes have parts of it, it is one."""
    if name not in relevance.members or relevance.sharding(name).is_divided:
        return 1
    return stacked_layers(relevance.members[name], relevance.sharding(name).numel)


def _select_rows(
    values: Tensor, kept: Tensor | None, *, rate: float, scope: str | Structure, layout: str, order: str, name: str
) -> Tensor:
    """The packed mask of one tensor, selected group by group."""
    view = as_rows(values, layout, scope, name)
    result = torch.empty(values.shape, dtype=torch.bool, device="cpu")
    result_view = as_rows(result, layout, scope, name)
    kept_view = None if kept is None else as_rows(bits.unpack(kept, values.shape), layout, scope, name)
    stack, rows = view.shape[:2]
    entries = math.prod(view.shape[2:])
    length = scope.size if isinstance(scope, Structure) else entries
    k = scope.pruned(rate) if isinstance(scope, Structure) else number_to_prune(rate, entries)
    step = max((CHUNK if values.device.type == "cpu" else DEVICE_CHUNK) // max(entries, 1), 1)
    for number in range(stack):
        for start in range(0, rows, step):
            block = view[number, start : start + step]
            old = None if kept_view is None else kept_view[number, start : start + step].reshape(-1, length)
            chosen = smallest_per_row(block.reshape(-1, length), k, order=order, kept=old, name=name)
            result_view[number, start : start + step] = chosen.reshape(block.shape).cpu()
    return bits.pack(result)
