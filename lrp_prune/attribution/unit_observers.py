"""The observers of units: which are scored, what they own, and what comes of their sums."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lrp_prune.attribution.conductance import Conductance
from lrp_prune.attribution.unit_statistics import ReadStatistic
from lrp_prune.engine.batch_layout import BatchLayout
from lrp_prune.engine.blocks import Blocks
from lrp_prune.engine.channels import by_weight, on_parameter, read_axes
from lrp_prune.engine.shadow import NOTHING
from lrp_prune.engine.tracing import STACKED, UnitTracer
from lrp_prune.engine.unit_table import Group
from lrp_prune.engine.uses import Observer, Use
from lrp_prune.models.wording import listed
from lrp_prune.names import layer_of, matches
from lrp_prune.relevance.members import Member
from lrp_prune.relevance.statistics import Statistic
from lrp_prune.relevance.unscored import UnscoredWeightsWarning, patterns_of
from lrp_prune.without_data import on_own_data

UNIT_KINDS: tuple[str, ...] = ("block", "head", "neuron")
"""The granularities that are found by tracing, from coarse to fine."""


class Choice(NamedTuple):
    """Which units are wanted: those that a ``chosen`` weight makes, and none that is excluded or has to be left alone."""

    chosen: Mapping[str, Tensor]
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    trainable_only: bool


class Units(NamedTuple):
    """What is known of all units.

    Args:
        sums: by group.
        members: by group.
        left: layers without units, with the reason.
        cut: groups that no relevance reaches.
    """

    sums: dict[str, Tensor]
    members: dict[str, tuple[Member, ...]]
    left: dict[str, str]
    cut: list[str]


Found = tuple[str, Sequence[str], Tensor, tuple[Member, ...]]
"""A group's name, the weights that read it, its sums and its members."""


class UnitObservers:
    """Makes a statistic for each layer that reads units, and groups of units in the end.

    Args:
        kinds: of units, some of :data:`UNIT_KINDS`.
        statistic: see :mod:`~lrp_prune.attribution.unit_statistics`; ``structure`` finds units and sums nothing.
        batch: tells samples and tokens apart.
        parameters: all of the model, by canonical name.
        choice: which units are wanted.
        on_path: whether inputs come from zeros in several passes over a batch, see :meth:`begin`.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        statistic: Statistic,
        batch: BatchLayout,
        parameters: Mapping[str, nn.Parameter],
        choice: Choice,
        on_path: bool = False,
    ) -> None:
        self._kinds = [kind for kind in UNIT_KINDS if kind in kinds]
        self._statistic, self._batch, self._parameters, self._choice = statistic, batch, parameters, choice
        self.tracer = UnitTracer({name: tuple(entry.shape) for name, entry in parameters.items()}, kinds)
        self._on_path, self._point, self._points = on_path, 0, 1
        self._reads: dict[tuple[str, str], ReadStatistic] = {}
        self._finished: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self._reached: set[tuple[str, str]] = set()
        self._heads: dict[str, Tensor] = {}
        """Of each weight that reads heads, the head of each of its entries, in a shape that broadcasts to it."""

    def begin(self, point: int, points: int) -> None:
        """Go to one of several points on the way from zeros to the inputs."""
        self._point, self._points = point, points
        for statistic in self._reads.values():
            if statistic.path is not None:
                statistic.path.begin(point, points)

    def end(self) -> None:
        """A pass at such a point is over."""
        for statistic in self._reads.values():
            if statistic.path is not None:
                statistic.path.end()

    def observers(self, use: Use) -> list[Observer]:
        """What observes a use: one statistic for each kind of units that the layer reads."""
        reading, name = use.reading, use.origin.name
        if reading is None or read_axes(use.form, use.weight, use.weight) is None:
            return []
        found: list[Observer] = []
        for kind in self._kinds:
            if kind == "neuron" and (reading.neurons is None or reading.passes):
                continue
            if kind == "head":
                owners = self._heads.get(name) if reading.heads is None else self._owned_by_heads(use, reading.heads)
                if reading.heads is None or owners is None:
                    continue
                self._heads[name] = owners
            found.append(self._statistic_of(kind, name))
        return found

    @on_own_data()
    def _owned_by_heads(self, use: Use, heads: Tensor) -> Tensor | None:
        """Which head each entry of a weight reads, -1 for none; None where it is not known which these are."""
        if use.origin.layout is None or use.origin.name in self._heads:
            return self._heads.get(use.origin.name)
        by_entry = by_weight(use.form, use.weight, heads + 1, reading=True)
        owners = on_parameter(by_entry, use.origin)
        return None if owners is None else owners - 1

    def _statistic_of(self, kind: str, name: str) -> ReadStatistic:
        if (kind, name) not in self._reads:
            units = partial(self._units, kind)
            path = Conductance(layer_of(name)) if self._on_path else None
            if path is not None:
                path.begin(self._point, self._points)
            self._reads[kind, name] = ReadStatistic(layer_of(name), self._statistic, self._batch, units, path)
        return self._reads[kind, name]

    @on_own_data()
    def _units(self, kind: str, use: Use) -> Tensor:
        assert use.reading is not None
        if kind == "neuron":
            assert use.reading.neurons is not None
            numbers = self.tracer.table.roots(use.reading.neurons)
            return torch.where(numbers > NOTHING, numbers, -1)
        if kind == "head":
            assert use.reading.heads is not None
            return use.reading.heads
        return torch.zeros(use.reading.channels, dtype=torch.int32, device="cpu")

    def finish(self) -> Units:
        """All groups of wanted units, in the order of the model's layers."""
        self._reached = {key for key, statistic in self._reads.items() if statistic.reached}
        self._finished = {key: statistic.finish() for key, statistic in self._reads.items()}
        units = Units({}, {}, {}, [])
        for kind in self._kinds:
            prefix = f"{kind}:" if len(self._kinds) > 1 else ""
            for name, readers, sums, members in getattr(self, f"_finish_{kind}s")(units.left):
                if any((kind, reader) in self._reached for reader in readers):
                    units.sums[prefix + name], units.members[prefix + name] = sums, members
                else:
                    units.cut.append(name)
        self._reads, self._finished, self._reached = {}, {}, set()
        if units.sums and units.cut:
            warnings.warn(
                f"no relevance reaches the units that enter {listed(patterns_of(units.cut))}: the explained value does not "
                "depend on them, or the rules stop before. They are left out, and stay",
                UnscoredWeightsWarning,
                stacklevel=2,
            )
        return units

    def _finish_neurons(self, left: dict[str, str]) -> Iterable[Found]:
        groups, unread = self.tracer.table.groups()
        left.update(unread)
        self._tell_left(unread)
        for group in groups:
            if self._wanted(group.producers, group.readers):
                yield group.name, group.readers, self._neuron_sums(group), group.members

    def _neuron_sums(self, group: Group) -> Tensor:
        sums = torch.zeros(len(group.units), device="cpu")
        index = {number: place for place, number in enumerate(group.units.tolist())}
        for reader in group.readers:
            if ("neuron", reader) in self._finished:
                numbers, values = self._finished["neuron", reader]
                roots = self.tracer.table.roots(numbers.to(torch.int32)).tolist()
                here = [place for place, root in enumerate(roots) if root in index]
                sums = sums.to(torch.promote_types(sums.dtype, values.dtype))
                sums.index_add_(
                    0,
                    torch.tensor([index[roots[place]] for place in here], dtype=torch.int64, device="cpu"),
                    values[here].to(sums.dtype),
                )
        return sums

    def _finish_heads(self, left: dict[str, str]) -> Iterable[Found]:
        for name, owners in self._heads.items():
            if self._wanted((name,), ()):
                number = int(owners.max()) + 1
                member = Member(name, owners, reads=True)
                yield layer_of(name), (name,), self._placed("head", name, number), (member,)

    def _finish_blocks(self, left: dict[str, str]) -> Iterable[Found]:
        assert self.tracer.blocks is not None
        blocks = self.tracer.blocks
        why = blocks_left(blocks, lambda name: self._wanted((name,), ()))
        for _, name in [key for key in self._finished if key[0] == "block"]:
            others = blocks.found.get(name)
            if others is None or not self._wanted((name,), ()):
                continue
            owned = [name, *(other for other in self._parameters if other in others)]
            members = [Member(each, torch.zeros((1,) * self._parameters[each].dim(), device="cpu")) for each in owned]
            yield layer_of(name), (name,), self._placed("block", name, 1), tuple(members)
        if why and blocks.found:
            warnings.warn(f"no block and left alone: {why}", stacklevel=2)

    def _placed(self, kind: str, name: str, number: int) -> Tensor:
        """Sums of the units 0, 1, ... of a layer."""
        numbers, values = self._finished[kind, name]
        return values.new_zeros(number).index_add_(0, numbers, values)

    def _wanted(self, makers: Sequence[str], readers: Sequence[str]) -> bool:
        chosen, include, exclude, trainable_only = self._choice
        if any(matches(name, exclude) for name in makers):
            return False
        if include is not None:
            return any(name in chosen for name in (*makers, *readers))
        if trainable_only and not all(self._parameters[name].requires_grad for name in makers):
            return False
        return any(name in chosen for name in makers)

    def _tell_left(self, left: Mapping[str, str]) -> None:
        """Say once which convolutions and stacks of layers have no units: of other layers most have none, and are meant to."""
        kinds: dict[str, list[str]] = {}
        for name, why in left.items():
            if self._parameters[name].dim() > 2 and name not in self.tracer.table.stacked and self._wanted((name,), ()):
                kind = "stacked weight" if why == STACKED else "convolution"
                kinds.setdefault(kind, []).append(f"{layer_of(name)} ({why})")
        for kind, named in kinds.items():
            warnings.warn(
                f"{len(named)} {kind}{'s have' if len(named) > 1 else ' has'} no units that could be removed and "
                f"{'are' if len(named) > 1 else 'is'} left alone: {listed(named, 3)}",
                stacklevel=2,
            )


def blocks_left(blocks: Blocks, wanted: Callable[[str], bool] = lambda name: True) -> str:
    """Which layers write into a residual stream and are no blocks, and why not; empty if there are none."""
    mixed = {name: function for name, function in blocks.mixed.items() if wanted(name)}
    shared = [name for name in blocks.shared if wanted(name)]
    reasons = []
    if mixed:
        layers = listed(patterns_of(map(layer_of, mixed)), 3)
        functions = listed(dict.fromkeys(mixed.values()), 3)
        reasons.append(
            f"what is added to a residual stream is more than the output of {layers} (it comes out of {functions})"
        )
    if shared:
        reasons.append(f"the weights of {listed(patterns_of(map(layer_of, shared)), 3)} write something else as well")
    return ", and ".join(reasons)
