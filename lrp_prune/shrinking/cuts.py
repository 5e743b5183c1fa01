"""Cuts: which indices of a parameter are kept along its axes, and the model with what they leave, and back."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrp_prune.shrinking.heads import Slices
from lrp_prune.shrinking.removal import Removal, looked_up, removable


class Cut(NamedTuple):
    """What of a parameter is kept.

    Args:
        kept: by axis, the indices, int ``[kept]``; all of the others.
        rows: of a convolution in groups instead, int ``[rows]``.
        columns: of each of these rows, int ``[rows, columns]``.
        groups: how many groups are left of it.
        layers: of layers that are stacked, what each keeps along the one axis that is in ``kept``, int ``[layers, kept]``.
    """

    kept: Mapping[int, Tensor]
    rows: Tensor | None = None
    columns: Tensor | None = None
    groups: int = 0
    layers: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """A new tensor with what is kept."""
        result = tensor.detach()
        if self.rows is not None and self.columns is not None:
            rows, columns = self.rows.to(tensor.device), self.columns.to(tensor.device)
            return result[rows[:, None], columns].contiguous()
        if self.layers is not None:
            (axis,) = self.kept
            kept = self.layers.to(tensor.device)
            shape = [*tensor.shape[:axis], kept.shape[1], *tensor.shape[axis + 1 :]]
            across = [size if dim in (0, axis) else 1 for dim, size in enumerate(shape)]
            return result.gather(axis, kept.reshape(across).expand(shape))
        for axis, kept in self.kept.items():
            result = result.index_select(axis, kept.to(tensor.device))
        return result.clone() if result is tensor or not self.kept else result


def cuts_of(removal: Removal, shapes: Mapping[str, Sequence[int]]) -> dict[str, Cut]:
    """The cuts that take out what goes."""
    gone: dict[str, dict[int, Tensor]] = {}

    def note(parameter: str, axis: int, indices: Tensor) -> None:
        size = shapes[parameter][axis]
        axes = gone.setdefault(parameter, {})
        axes[axis] = axes.get(axis, torch.zeros(size, dtype=torch.bool, device="cpu")) | indices

    users: dict[tuple[str, int], list[tuple[int, Slices]]] = {}
    for index, group in enumerate(removal.groups):
        lost = torch.cat([removal.gone[index], torch.zeros(1, dtype=torch.bool, device="cpu")])  # the last is nobody's
        for member in group.members:
            if member.parameter not in removal.grouped and member.parameter not in removal.stacks:
                # A unit that is all there is along an axis has nothing to be told apart from.
                axis = member.dim if member.dim is not None else 0
                note(member.parameter, axis, lost[member.owners.reshape(-1).long()])
        for each in removal.slices.get(group.name, ()) if group.kind == "head" else ():
            users.setdefault((each.parameter, each.axis), []).append((index, each))
    for (parameter, axis), dependents in users.items():
        note(parameter, axis, removable(removal, dependents))
    cuts = {
        parameter: Cut({axis: (~lost).nonzero().view(-1) for axis, lost in axes.items() if bool(lost.any())})
        for parameter, axes in gone.items()
    }
    cuts = {parameter: cut for parameter, cut in cuts.items() if cut.kept}
    for parameter in removal.grouped:
        cut = _of_groups(removal, parameter)
        if cut is not None:
            cuts[parameter] = cut
    for parameter, stack in removal.stacks.items():
        lost = looked_up(removal, stack.units)
        if bool(lost.any()):
            layers = (~lost).nonzero()[:, 1].reshape(len(lost), -1)  # as many of each: what is over was kept
            cuts[parameter] = Cut({stack.axis: layers[0]}, layers=layers)
    return cuts


def _of_groups(removal: Removal, parameter: str) -> Cut | None:
    layer = removal.grouped[parameter]
    rows, width = looked_up(removal, layer.rows), looked_up(removal, layer.width)
    if not bool(rows.any() | width.any()):
        return None
    left = (~(rows.all(1) & width.all(1))).nonzero().view(-1).tolist()
    kept_rows, columns = [], []
    for group in left:
        here = (~rows[group]).nonzero().view(-1)
        kept_rows.append(here + group * rows.shape[1])
        columns.append((~width[group]).nonzero().view(-1).expand(len(here), -1))
    return Cut({}, torch.cat(kept_rows), torch.cat(columns), len(left))


class Slot(NamedTuple):
    """A place of a module that holds a tensor, or a number, and both of its values; of a number the module and its attribute."""

    put: Callable[[Any], None]
    before: Any
    after: Any
    of: tuple[object, str] | None = None


class Swap:
    """A model with other tensors and numbers in some places, and back.

    Args:
        slots: the places.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self.slots = list(slots)

    def put(self) -> None:
        """Put in what it becomes."""
        for slot in self.slots:
            slot.put(slot.after)

    def back(self) -> None:
        """Put in what was there before."""
        for slot in reversed(self.slots):
            slot.put(slot.before)


def tensors_cut(
    module: nn.Module, cuts: Mapping[str, Cut], places: Mapping[str, Sequence[tuple[nn.Module, str]]]
) -> Swap:
    """The cut parameters in all of their places, and the buffers that belong to cut vectors (of normalizations).

    Args:
        module: the model.
        cuts: by canonical name of a parameter.
        places: of each parameter, the modules that hold it, and what it is called there.
    """
    slots = []
    cut_buffers: set[tuple[int, str]] = set()
    for name, cut in cuts.items():
        owners = places[name]
        old = owners[0][0]._parameters[owners[0][1]]
        assert old is not None
        new = nn.Parameter(cut.of(old), old.requires_grad)
        for owner, own in owners:
            slots.append(Slot(setter(owner._parameters, own), old, new))
            if old.dim() > 1 or list(cut.kept) != [0]:
                continue
            for buffer, value in owner._buffers.items():
                if value is not None and value.shape == old.shape and (id(owner), buffer) not in cut_buffers:
                    cut_buffers.add((id(owner), buffer))
                    slots.append(Slot(setter(owner._buffers, buffer), value, cut.of(value)))
    return Swap(slots)


def setter(table: dict[str, Any], name: str) -> Callable[[Any], None]:
    """What puts a value into a table under a name."""

    def put(value: Any) -> None:
        table[name] = value

    return put
