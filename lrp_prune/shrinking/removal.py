"""Which of the dead units can be taken out together: what is left must be matrices again, and layers that fit each other."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lrp_prune.pruning.kinds import layer_group
from lrp_prune.relevance.members import NOBODY
from lrp_prune.shrinking.heads import Slices
from lrp_prune.shrinking.tables import Grouped, Stack, grouped_of, stacks_of
from lrp_prune.shrinking.units import Group


@dataclass
class Removal:
    """Which units go, and why the other dead ones do not.

    Args:
        groups: all groups of the model.
        slices: what heads are made by, by the name of the group.
        grouped: convolutions in groups, by the name of their weight.
        stacks: layers that are stacked in one parameter, by its name.
        gone: bool ``[units]`` for each group.
        why: for groups of which less goes than is dead, the reasons.
    """

    groups: Sequence[Group]
    slices: Mapping[str, Sequence[Slices]]
    grouped: Mapping[str, Grouped]
    stacks: Mapping[str, Stack]
    gone: list[Tensor]
    why: dict[int, list[str]] = field(default_factory=dict)

    def keep(self, index: int, units: Tensor, reason: str) -> bool:
        """Leave units of a group where they are; whether some of them were to go."""
        if not bool((self.gone[index] & units).any()):
            return False
        self.gone[index] = self.gone[index] & ~units
        reasons = self.why.setdefault(index, [])
        if reason not in reasons:
            reasons.append(reason)
        return True

    def only(self, parts: Iterable[int]) -> "Removal":
        """The same of some of the groups; nothing of the others goes."""
        chosen = set(parts)
        gone = [each if index in chosen else torch.zeros_like(each) for index, each in enumerate(self.gone)]
        return Removal(self.groups, self.slices, self.grouped, self.stacks, gone, self.why)

    def sets(self, index: int) -> list[Tensor]:
        """The units of a group in sets of which as many stay of each, bool ``[units]``: those of a layer, or all of them."""
        for stack in self.stacks.values():
            if bool((stack.units[..., 0] == index).any()):
                return stack.sets(index, len(self.gone[index]))
        return [torch.ones_like(self.gone[index])]


def removal_of(
    groups: Sequence[Group],
    slices: Mapping[str, Sequence[Slices]],
    parameters: Mapping[str, Tensor],
    owners: Mapping[str, nn.Module],
    uniform: bool,
    multiple_of: int = 1,
) -> Removal:
    """All that can go, of what is dead.

    Args:
        groups: of the model.
        slices: what heads are made by.
        parameters: of the model, by canonical name.
        owners: the module that has each of them.
        uniform: take the same number out of each layer of a kind.
        multiple_of: what the number of neurons that are left has to be.
    """
    grouped = grouped_of(groups, parameters, owners)
    stacks = stacks_of(groups, parameters, grouped)
    removal = Removal(groups, slices, grouped, stacks, [group.dead.clone() for group in groups])
    for index, group in enumerate(groups):
        why = _untold(group, slices, {*grouped, *stacks})
        if why:
            removal.keep(index, group.dead, why)
    changed = True
    while changed:  # what stays on one side stays on all others: less and less goes, until it fits everywhere
        changed = any([_keep_one(removal), _fit_heads(removal), _fit_convolutions(removal), _fit_stacks(removal)])
        if not changed and uniform:
            changed = _fit_kinds(removal)
        if not changed and multiple_of > 1:
            changed = _fit_multiples(removal, multiple_of)
    return removal


def coupled(removal: Removal) -> list[list[int]]:
    """The indices of groups that units go of, those together that can only go together."""
    active = [index for index, gone in enumerate(removal.gone) if bool(gone.any())]
    parts = [{index} for index in active]
    names = {removal.groups[index].name: index for index in active if removal.groups[index].kind == "head"}
    shared: dict[str, set[int]] = {}
    for name, found in removal.slices.items():
        for each in found:
            if name in names:
                shared.setdefault(each.parameter, set()).add(names[name])
    for name, layer in removal.grouped.items():
        numbers = {int(value) for table in layer for value in torch.unique(table[..., 0]).tolist()}
        shared[f"{name} in groups"] = numbers & set(active)
    for together in shared.values():
        touching = [part for part in parts if part & together]
        if len(touching) > 1:
            parts = [part for part in parts if not part & together] + [set().union(*touching)]
    return sorted(sorted(part) for part in parts)


def _untold(group: Group, slices: Mapping[str, Sequence[Slices]], told: Collection[str]) -> str:
    """Why nothing of a group can go."""
    if group.kind == "head" and not slices.get(group.name):
        return "nothing tells which rows of query, key and value its heads are made by"
    for member in group.members:
        if member.dim is None and member.parameter not in told and member.owners.numel() > 1:
            return f"its units own single entries of {member.parameter}, and no whole rows"
    return ""


def _keep_one(removal: Removal) -> bool:
    """A layer of no channels is none."""
    changed = False
    for index, gone in enumerate(removal.gone):
        if len(gone) and bool(gone.all()):
            first = torch.zeros_like(gone)
            first[0] = True
            changed |= removal.keep(index, first, "one of its units stays, as a zero: a layer has to have one")
    return changed


def _fit_heads(removal: Removal) -> bool:
    """Of heads that share a key, either all go, or as many as of any others that share one."""
    changed = False
    dependents: dict[tuple[str, int], list[tuple[int, Slices]]] = {}
    for index, group in enumerate(removal.groups):
        if group.kind == "head":
            for each in removal.slices.get(group.name, ()):
                dependents.setdefault((each.parameter, each.axis), []).append((index, each))
    for (parameter, _), users in dependents.items():
        free = removable(removal, users)
        for index, each in users:
            others = [removal.groups[other].name for other, _ in users if other != index]
            changed |= removal.keep(
                index,
                each.depends[:, ~free & (each.depends.sum(0) == 1)].any(1),
                f"{parameter} is shared with {', '.join(others[:2])}, where they stay",
            )
            if each.sets is not None:
                whole = torch.stack([bool(free[_like(each, row)].all()) * row for row in each.sets]).any(0)
                sets = [row for row in each.sets if not bool((row & whole).any())]
                why = f"heads that share rows of {parameter} go together, or the same number of each such set"
                changed |= _even(removal, index, sets, why)
    return changed


def _like(each: Slices, row: Tensor) -> Tensor:
    return (each.depends == row[:, None]).all(0)


def _even(removal: Removal, index: int, sets: Sequence[Tensor], why: str) -> bool:
    """As many units go of each of these sets as of that of which fewest are dead."""
    if not sets:
        return False
    gone = removal.gone[index]
    fewest = min(int((gone & row).sum()) for row in sets)
    fewest = min(fewest, min(int(row.sum()) for row in sets) - 1)
    changed = False
    for row in sets:
        surplus = torch.zeros_like(gone)
        surplus[(gone & row).nonzero().view(-1)[fewest:]] = True
        changed |= removal.keep(index, surplus, why)
    return changed


def removable(removal: Removal, users: Sequence[tuple[int, Slices]]) -> Tensor:
    """Which indices of a parameter no head that stays depends on, bool ``[size]``."""
    size = users[0][1].depends.shape[1]
    used, needed = (torch.zeros(size, dtype=torch.bool, device="cpu") for _ in range(2))
    for index, each in users:
        used |= each.depends.any(0)
        needed |= each.depends[~removal.gone[index]].any(0)
    return used & ~needed


def looked_up(removal: Removal, table: Tensor) -> Tensor:
    """Which entries of a table of units go."""
    found = torch.zeros(table.shape[:-1], dtype=torch.bool, device="cpu")
    for index in torch.unique(table[..., 0]).tolist():
        if index != NOBODY:
            here = table[..., 0] == index
            found[here] = removal.gone[index][table[..., 1][here]]
    return found


def _fit_convolutions(removal: Removal) -> bool:
    """Whole groups go, and of the others as many rows and channels of each."""
    changed = False
    for name, layer in removal.grouped.items():
        rows, width = looked_up(removal, layer.rows), looked_up(removal, layer.width)
        whole = rows.all(1) & width.all(1)
        if bool(whole.all()):
            whole[0] = False
        for table, gone in ((layer.rows, rows), (layer.width, width)):
            fewest = min(int(gone[~whole].sum(1).min()), gone.shape[1] - 1)
            counted = gone.cumsum(1)
            surplus = gone & (counted > fewest) & ~whole[:, None]
            for index in torch.unique(table[surplus][:, 0]).tolist():
                units = torch.zeros_like(removal.gone[index])
                units[table[surplus][table[surplus][:, 0] == index][:, 1]] = True
                changed |= removal.keep(
                    index, units, f"{name} is in groups: whole groups go, or the same number of channels of each"
                )
    return changed


def _fit_stacks(removal: Removal) -> bool:
    """The same number of units goes of each layer of a stack."""
    changed = False
    for name, stack in removal.stacks.items():
        for index in torch.unique(stack.units[..., 0]).tolist():
            if index != NOBODY:
                sets = stack.sets(index, len(removal.gone[index]))
                changed |= _even(
                    removal, index, sets, f"{name} holds several layers, of which the same number of channels goes"
                )
    return changed


def _fit_kinds(removal: Removal) -> bool:
    """The same number of units goes of each layer of a kind; of heads that share keys also in the same way."""
    kinds: dict[tuple[str, str, int], list[int]] = {}
    for index, group in enumerate(removal.groups):
        kinds.setdefault((group.kind, layer_group(group.name), len(group.dead)), []).append(index)
    changed = False
    for indices in kinds.values():
        sets = {index: _sets(removal, index) for index in indices}
        if all(each is not None for each in sets.values()):
            chosen = _same_of_sets(removal, {index: each for index, each in sets.items() if each is not None})
        else:
            parts = {index: [removal.gone[index] & row for row in removal.sets(index)] for index in indices}
            fewest = min(int(part.sum()) for each in parts.values() for part in each)
            chosen = {
                index: torch.stack([_first(part, fewest) for part in each]).any(0) for index, each in parts.items()
            }
        for index, units in chosen.items():
            changed |= removal.keep(
                index, removal.gone[index] & ~units, "uniform: no more goes than of the other layers of its kind"
            )
    return changed


def _fit_multiples(removal: Removal, number: int) -> bool:
    """So many neurons of a layer stay that their number can be divided; heads are as wide as they are."""
    changed = False
    for index, group in enumerate(removal.groups):
        for row in removal.sets(index) if group.kind == "neuron" else ():
            gone = removal.gone[index] & row
            surplus = -(int(row.sum()) - int(gone.sum())) % number
            last = gone & ~_first(gone, int(gone.sum()) - surplus)
            changed |= removal.keep(index, last, f"multiple_of={number}: their number is one with these")
    return changed


def _first(units: Tensor, number: int) -> Tensor:
    """The first of some units, bool ``[units]``."""
    return units & (units.cumsum(0) <= number)


def _sets(removal: Removal, index: int) -> Tensor | None:
    """Which heads share keys, bool ``[sets, heads]``; None where each has its own, or they share in no such way."""
    group = removal.groups[index]
    slices = removal.slices.get(group.name, ()) if group.kind == "head" else ()
    return next((each.sets for each in slices if each.sets is not None), None)


def _same_of_sets(removal: Removal, sets: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """As many whole sets of each layer, or as many heads of each of its sets, whichever is more."""
    gone = {index: removal.gone[index] for index in sets}
    whole = {index: each[(each & ~gone[index]).sum(1) == 0] for index, each in sets.items()}
    number = min(len(each) for each in whole.values())
    width = min(int((each & gone[index]).sum(1).min()) for index, each in sets.items())
    largest, count = (
        max(values) for values in zip(*((int(e.sum(1).max()), len(e)) for e in sets.values()), strict=True)
    )
    if number * largest >= min(width, largest - 1) * count:
        return {index: each[:number].any(0) for index, each in whole.items()}
    width = min(width, largest - 1)
    return {
        index: torch.stack([_first(gone[index] & row, width) for row in each]).any(0) for index, each in sets.items()
    }
