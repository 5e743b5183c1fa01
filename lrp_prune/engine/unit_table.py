"""The units of a model: which channels belong together, and which entries of which parameters they own.

A layer's output channels get numbers of their own at its first use. What makes channels depend on each other merges their
numbers: a residual sum, a gated product, a convolution of one filter for each channel, a layer that is used twice. In the end
each set of merged numbers is a unit, and the layers that share units are a group.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lrp_prune.engine.origins import Slot
from lrp_prune.engine.reasons import Reasons
from lrp_prune.engine.shadow import MIXED, NOTHING, alike, units_in
from lrp_prune.names import layer_of
from lrp_prune.relevance.members import NOBODY, Member
from lrp_prune.without_data import on_own_data


class Group(NamedTuple):
    """Units that are made by the same layers: the number that stands for each, and what they own."""

    name: str
    units: Tensor
    members: tuple[Member, ...]
    producers: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass
class _Owned:
    """Entries of a parameter that belong to numbered units, in a shape that broadcasts to it."""

    parameter: str
    numbers: Tensor
    reads: bool
    zero: bool
    seen: set[int] | None = None
    """Of a parameter that is a stack of layers, which of them are known."""

    def put(self, index: int, numbers: Tensor) -> None:
        """What is known of one of the layers of a stack."""
        assert self.seen is not None
        shape = alike(self.numbers[0], numbers)[0].shape
        whole = (
            self.numbers.expand(len(self.numbers), *shape).clone() if shape != self.numbers.shape[1:] else self.numbers
        )
        whole[index] = numbers
        self.numbers = whole
        self.seen.add(index)


class Stacked(NamedTuple):
    """Numbers of the channels of a stack of layers: the first, of how many channels and layers, and which layers were run."""

    start: int
    channels: int
    number: int
    seen: set[int]


@dataclass
class UnitTable:
    """Gives numbers to channels, merges them, and tells groups of units."""

    shapes: Mapping[str, tuple[int, ...]]
    _parents: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64, device="cpu"))
    _ranges: dict[tuple[str, object], Tensor] = field(default_factory=dict)
    _stacks: dict[tuple[str, object], Stacked] = field(default_factory=dict)
    _owned: dict[tuple[str, object, bool], _Owned] = field(default_factory=dict)
    _refused: Reasons = field(default_factory=Reasons)
    _ends: Reasons = field(default_factory=Reasons)
    _left: dict[str, str] = field(default_factory=dict)
    _used_otherwise: set[str] = field(default_factory=set)

    def numbers_for(self, parameter: str, part: object, channels: int, slot: Slot | None = None) -> Tensor:
        """The numbers of a layer's output channels ``[channels]``: the same at each of its uses.

        Args:
            parameter: canonical name.
            part: what tells this part of the parameter from others.
            channels: how many there are.
            slot: which layer of a stack it is; all of them get numbers at once.
        """
        found = self._ranges.get((parameter, part))
        if found is None:
            start = len(self._parents)
            number = channels * (1 if slot is None else slot.layers)
            found = torch.arange(start, start + number, dtype=torch.int32, device="cpu")
            self._parents = torch.cat([self._parents, found.long()])
            self._ranges[parameter, part] = found
            if slot is not None:
                self._stacks[parameter, part] = Stacked(start, channels, slot.layers, set())
        if slot is None:
            return found
        self._stacks[parameter, part].seen.add(slot.layer)
        return found[slot.layer * channels : (slot.layer + 1) * channels]

    @on_own_data()
    def roots(self, numbers: Tensor) -> Tensor:
        """The number that stands for each unit; what is no unit stays as it is."""
        numbers = numbers.to("cpu")
        roots = numbers.long().clamp(min=0)
        while True:
            above = self._parents[roots]
            if torch.equal(above, roots):
                break
            roots = above
        return torch.where(numbers > NOTHING, roots.to(torch.int32), numbers)

    def merge(self, first: Tensor, second: Tensor) -> Tensor:
        """Make one unit of two, entry by entry where both are units; returns the numbers that stand for them."""
        device = first.device
        first, second = alike(first.to("cpu"), second.to("cpu"))
        both = (first > NOTHING) & (second > NOTHING) & (first != second)
        pairs = torch.stack([first[both], second[both]]) if bool(both.any()) else None
        while pairs is not None:
            one, other = self.roots(pairs[0]).long(), self.roots(pairs[1]).long()
            if torch.equal(one, other):
                break
            low, high = torch.minimum(one, other), torch.maximum(one, other)
            self._parents.scatter_reduce_(0, high, low, "amin")
        return self.roots(first).to(device)

    @property
    def stacked(self) -> set[str]:
        """Parameters that are stacks of layers, each of which is used by itself."""
        return {parameter for parameter, _ in self._stacks}

    def own(
        self,
        parameter: str,
        part: object,
        numbers: Tensor,
        reads: bool = False,
        zero: bool = True,
        slot: Slot | None = None,
    ) -> None:
        """Note entries of a parameter as belonging to units; at a second use the units of both are merged.

        Args:
            parameter: canonical name.
            part: what tells this part of the parameter from others (its layout).
            numbers: in a shape that broadcasts to the parameter's.
            reads: whether the entries are what a layer reads the units by.
            zero: whether there is nothing to be read of a unit once all that it owns is zero.
            slot: which layer of a stack these are the entries of; numbers broadcast to its shape then.
        """
        known = self._owned.get((parameter, part, reads))
        numbers = numbers.to("cpu")
        if slot is not None:
            if known is None:
                nothing = torch.full((slot.layers, *(1,) * numbers.dim()), NOTHING, dtype=torch.int32, device="cpu")
                known = self._owned[parameter, part, reads] = _Owned(parameter, nothing, reads, zero, set())
            known.put(slot.layer, self._owned_again(known, known.numbers[slot.layer], numbers, zero, slot.layer))
        elif known is None:
            self._owned[parameter, part, reads] = _Owned(parameter, numbers, reads, zero)
        else:
            known.numbers = self._owned_again(known, known.numbers, numbers, zero)

    def _owned_again(
        self, known: _Owned, before: Tensor, numbers: Tensor, zero: bool, index: int | None = None
    ) -> Tensor:
        """The numbers of entries after one more use of them."""
        known.zero &= zero
        if known.seen is not None and index not in known.seen:
            return numbers
        before, now = alike(before, numbers)
        merged = self.merge(before, now)
        both = (before > NOTHING) & (now > NOTHING)
        self._share(known, torch.where(both, NOTHING, torch.maximum(before, now)))
        # An entry by which something else is read as well cannot be given to the units.
        return torch.where(both, merged, torch.minimum(before, now))

    def _share(self, entry: _Owned, numbers: Tensor) -> None:
        """Units are read by weights that have to stay for something else; they can go where they leave nothing to be read."""
        units = units_in(numbers)
        self.end(units, f"{layer_of(entry.parameter)}, which has other uses,")
        if not entry.zero:
            self.refuse(units, f"{layer_of(entry.parameter)} reads something else by the same weights")

    def end(self, numbers: Tensor, function: str) -> None:
        """Units that go into what is not theirs alone by a function."""
        self._ends.note(self.roots(numbers), function)

    def lose(self, numbers: Tensor, zero: bool, function: str) -> None:
        """Units that :meth:`end`, and whether they are zero there once they are removed, without which they cannot be."""
        self.end(numbers, function)
        if not zero:
            self.refuse(numbers, f"{function} still has something of its channels when all that makes them is zero")

    def leave(self, parameter: str, reason: str) -> None:
        """A layer whose channels get no numbers, and why."""
        self._left[parameter] = reason

    def refuse(self, numbers: Tensor, reason: str) -> None:
        """Units that cannot be removed, and why."""
        self._refused.note(numbers, reason)

    def use_otherwise(self, parameter: str) -> None:
        """A parameter is used by more than layers, so that no entry of it can be given to units that layers read by it."""
        self._used_otherwise.add(parameter)

    def groups(self) -> tuple[list[Group], dict[str, str]]:
        """The groups in the order of their first layers; and for layers whose channels are no units, why."""
        self._complete()
        for entry in self._owned.values():
            if entry.reads and entry.parameter in self._used_otherwise:
                self._share(entry, entry.numbers)
                entry.numbers = torch.full_like(entry.numbers, MIXED)
        roots = {key: self.roots(numbers) for key, numbers in self._ranges.items()}
        refused = Reasons()
        for numbers, reason in self._refused.items():
            refused.note(self.roots(numbers.to(torch.int32)), reason)
        reads = [self.roots(entry.numbers).reshape(-1) for entry in self._owned.values() if entry.reads]
        read = units_in(torch.cat(reads)) if reads else torch.empty(0, device="cpu")
        left = dict(self._left)
        left.update(
            {
                parameter: self._unread(numbers)
                for (parameter, _), numbers in roots.items()
                if not bool(torch.isin(numbers, read).any())
            }
        )
        found = []
        wanted = {key: numbers for key, numbers in roots.items() if key[0] not in left}
        for keys in _connected(wanted, len(self._parents)):
            producers = tuple(dict.fromkeys(parameter for parameter, _ in keys))
            units = _ordered(torch.cat([roots[key] for key in keys]))
            units = units[torch.isin(units, read)]  # the others end elsewhere
            why = refused.of(units)
            if why:
                left.update(dict.fromkeys(producers, why[0]))
            else:
                found.append(self._group(producers, units))
        return _named(found), left

    def _complete(self) -> None:
        """Let layers of a stack that nothing went to have the units of one that something did: experts are used alike."""
        alone = [entry.numbers.reshape(-1) for entry in self._owned.values() if entry.seen is None]
        shared = self.roots(torch.cat(alone)) if alone else torch.empty(0, dtype=torch.int32, device="cpu")
        for key, stack in self._stacks.items():
            numbers = self._ranges[key].reshape(stack.number, stack.channels)
            missing = sorted(set(range(stack.number)) - stack.seen)
            pattern = min(stack.seen)
            known = self.roots(numbers[pattern]) if missing else numbers[pattern]
            steps = self._steps(known, pattern) if missing else None
            if steps is not None:
                away = torch.tensor(missing, dtype=torch.int32, device="cpu")[:, None] - pattern
                self.merge(numbers[missing], known + away * steps)
                # What all of the stack share (a shift) is of one unit with them.
                self.merge(numbers[missing], torch.where(torch.isin(known, shared), known, NOTHING))
        for entry in self._owned.values():
            if entry.seen is None:
                continue
            pattern, missing = min(entry.seen), sorted(set(range(len(entry.numbers))) - entry.seen)
            known = self.roots(entry.numbers[pattern])
            steps = self._steps(known, pattern) if missing else None
            if steps is not None:
                for index in missing:
                    entry.put(index, known + (index - pattern) * steps)

    def _steps(self, numbers: Tensor, layer: int) -> Tensor | None:
        """By how much the numbers of the next layer of the stacks are above these; None where they are not all of this layer.

        Where there is no unit it is 0.
        """
        stacks = sorted(self._stacks.values())  # by their first number
        starts = torch.tensor([stack.start for stack in stacks], device="cpu")
        channels = torch.tensor([stack.channels for stack in stacks], device="cpu")
        place = (torch.searchsorted(starts, numbers.long(), right=True) - 1).clamp(min=0)
        first = starts[place] + layer * channels[place]
        units = numbers > NOTHING
        if bool((units & ((numbers < first) | (numbers >= first + channels[place]))).any()):
            return None
        return torch.where(units, channels[place], 0).to(torch.int32)

    def _unread(self, numbers: Tensor) -> str:
        ways = sorted(self._ends.of(numbers))
        if not ways:
            return "nothing reads its channels"
        return f"its channels go into {', '.join(ways[:3])} before a layer reads them as they are"

    def _group(self, producers: tuple[str, ...], units: Tensor) -> Group:
        index = torch.full((len(self._parents) + 2,), NOBODY, dtype=torch.int32, device="cpu")
        index[units.long()] = torch.arange(len(units), dtype=torch.int32, device="cpu")
        members: dict[bool, list[Member]] = {True: [], False: []}
        for entry in self._owned.values():
            numbers = self.roots(entry.numbers)
            owners = torch.where(numbers > NOTHING, index[numbers.long().clamp(min=0)], NOBODY)
            if bool((owners != NOBODY).any()):
                members[entry.reads].append(Member(entry.parameter, owners, entry.reads))
        readers = tuple(dict.fromkeys(member.parameter for member in members[True]))
        return Group("", units, (*members[True], *members[False]), producers, readers)


def _connected(roots: Mapping[tuple[str, object], Tensor], size: int) -> list[list[tuple[str, object]]]:
    """Layers that share a unit, together.

    Args:
        roots: the numbers of each layer's units.
        size: above the largest of these.
    """
    parts: list[list[tuple[str, object]]] = []
    part_of = torch.full((size,), -1, dtype=torch.int64, device="cpu")
    now = list[int]()
    """Of each part that there was, the one that it belongs to by now."""
    for key, numbers in roots.items():
        before = part_of[numbers.long()]
        touching = sorted({now[part] for part in torch.unique(before[before >= 0]).tolist()})
        first = touching[0] if touching else len(parts)
        if not touching:
            parts.append([])
            now.append(first)
        parts[first].append(key)
        for other in touching[1:]:
            parts[first] += parts[other]
            parts[other] = []
            now = [first if part == other else part for part in now]
        part_of[numbers.long()] = first
    return [part for part in parts if part]


def _ordered(numbers: Tensor) -> Tensor:
    """Distinct numbers in the order in which they first occur."""
    return torch.tensor(list(dict.fromkeys(numbers.tolist())), dtype=torch.int32, device="cpu")


def _named(groups: list[Group]) -> list[Group]:
    """A group is called like the first layer that reads it; where several groups are, its producer is added."""
    names = [layer_of(group.readers[0]) for group in groups]
    return [
        group._replace(name=name if names.count(name) == 1 else f"{name}({layer_of(group.producers[0])})")
        for name, group in zip(names, groups, strict=True)
    ]
