"""The inputs of layers as rows, and the normal equations that are summed from them."""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lrp_prune.engine.batch_layout import BatchLayout, counted_places
from lrp_prune.engine.forms import Convolution, Form, TransposedConvolution
from lrp_prune.engine.uses import Product
from lrp_prune.names import layer_of
from lrp_prune.pruning.compensation.summing import mirrored_, with_ones, with_products, with_upper_products
from lrp_prune.pruning.compensation.weighing import roots_of_weights
from lrp_prune.pruning.pairs import Part
from lrp_prune.pruning.processes import Processes

_ENTRIES = 1 << 26
"""Entries of rows that are laid out at a time: patches of a convolution repeat each of its inputs."""
MANY = 10
"""Rows for each input, from which on halves of them are not told apart: the least squares of so many need no more damping."""


class Taken(NamedTuple):
    """What a layer's weight is multiplied with, apart from the model, which may write into what it has.

    Args:
        x: inputs of a linear layer, ``[..., in]``; what a convolution goes over.
        form: of the product.
        size: of the weight.
        counted: ``[samples, tokens]`` of the batch that a convolution goes over, which are no padding; None for all.
    """

    x: Tensor
    form: Form
    size: torch.Size
    counted: Tensor | None = None

    def on(self, device: torch.device | str) -> "Taken":
        """The same on a device."""
        return self._replace(x=self.x.to(device))

    @property
    def rows(self) -> list[Tensor]:
        """As ``[groups, rows, in]``, some rows at a time."""
        if isinstance(self.form, Convolution):
            return _patches(self.x, self.size, self.form, self.counted)
        return [self.x.reshape(1, -1, self.x.shape[-1])]


def taken_of(found: Product, part: Part, batch: BatchLayout, apart: bool = True) -> Taken | None:
    """What a layer's weight is multiplied with; None where that is not known.

    Args:
        found: the product.
        part: of it, the layer.
        batch: tells which tokens are no padding.
        apart: whether the model may write into what it has afterwards.
    """
    x, form = found.activation.detach(), found.form
    if isinstance(form, TransposedConvolution):
        return None
    if isinstance(form, Convolution):
        return Taken(x.clone() if apart else x, form, found.weight.shape, batch.counted)
    if part.rows is None and form.channel_dim != -1:
        return None
    edge = None if batch.counted is None else get_gradient_edge(found.activation)
    counted = batch.counted_rows(x.shape, layer_of(part.place.name), edge)
    x = part.of(x)
    if counted is not None:
        x, apart = x[part.of(counted)], False
    return Taken(x.clone() if apart else x, form, found.weight.shape)


def _patches(x: Tensor, weight: torch.Size, form: Convolution, counted: Tensor | None) -> list[Tensor]:
    """What the kernel sees at each place that counts."""
    dims = len(weight) - 2
    if x.dim() == dims + 1:
        x = x[None]
    size = weight[2:]
    stride, padding, dilation = (form.numbers(name, dims) for name in ("stride", "padding", "dilation"))
    reach = [step * (width - 1) for step, width in zip(dilation, size, strict=True)]
    if padding == "valid":
        padding = [0] * dims
    sides = (
        [(entry // 2, entry - entry // 2) for entry in reach]
        if padding == "same"
        else [(entry, entry) for entry in padding]
    )
    found, seen = [], 0
    each = max(1, _ENTRIES // max(x[0].numel() * size.numel(), 1))
    for some in torch.split(x, each):
        some = F.pad(some, list(itertools.chain.from_iterable(reversed(sides))))
        for dim in range(dims):
            some = some.unfold(2 + dim, reach[dim] + 1, stride[dim])[..., :: dilation[dim]]
        places = counted_places(counted, torch.Size((len(x), x.shape[1], some.shape[2]))) if dims == 1 else None
        own, seen = None if places is None else places[seen : seen + len(some)].flatten(), seen + len(some)
        # [samples, channels, *places, *kernel] -> [groups, samples and places, channels of the group and kernel]
        some = some.movedim(1, 1 + dims).flatten(0, dims)
        rows = some.reshape(len(some), form.groups, -1).transpose(0, 1)
        found.append(rows if own is None else rows[:, own])
    return found


class Systems:
    r"""Sums of products of a layer's inputs, of ones beside them for the bias, and with those of the dense model.

    :attr:`gram` is :math:`\sum x' x'^\top`, :attr:`crossed` :math:`\sum x x'^\top`, with :math:`x'` the input as it is and
    :math:`x` the dense model's: ``[groups, in + 1, in + 1]``. They are there once the sums are :meth:`over`, and so is
    :attr:`first`, the part of the Gram matrix that one half of the samples makes, as long as there are few.

    Args:
        parted: whether halves are told apart.
    """

    def __init__(self, parted: bool = True) -> None:
        self.count = 0
        self.gram: Tensor | None = None
        self.first: Tensor | None = None
        """Of one half of the samples; None where there are :data:`MANY`, or nothing in one of the halves."""
        self.crossed: Tensor | None = None
        self.paired = True
        """Whether there was a dense input for each."""
        self.known = True
        """Whether all inputs could be laid out as rows."""
        self.weighed = True
        """Whether each row has a weight of its own."""
        self._width = 0
        self._halves: list[Tensor | None] = [None, None]
        self._parted = parted
        self._mixed: Tensor | None = None

    @property
    def inputs(self) -> int:
        """How many inputs a row has, without the one for the bias."""
        return self._width - 1

    def add(
        self, rows: list[Tensor], dense: list[Tensor] | None, weights: Tensor | None = None, half: int | None = None
    ) -> None:
        """Add inputs, and the dense model's for the same places; each row counts as often as its weight says.

        Args:
            rows: each ``[groups, rows, in]``.
            dense: the same of the dense model.
            weights: of rows.
            half: of the samples, which these are of; None: of both, one after the other.
        """
        alike = dense is not None and [entry.shape for entry in dense] == [entry.shape for entry in rows]
        self.paired = self.paired and alike
        for index, (entry, root) in enumerate(zip(rows, roots_of_weights(weights, rows), strict=True)):
            pruned = with_ones(entry, root)
            self.weighed = self.weighed and isinstance(root, Tensor)
            self.count += entry.shape[1]
            self._width = entry.shape[2] + 1
            self._lay_together_if_many()
            middle = pruned.shape[1] // 2 if half is None else pruned.shape[1] * (half == 0)
            self._add(0, pruned[:, : middle if self._parted else None])
            if self._parted:
                self._add(1, pruned[:, middle:])
            if alike and dense is not None:
                self._mixed = with_products(self._mixed, with_ones(dense[index], root), pruned)

    def _add(self, half: int, rows: Tensor) -> None:
        if rows.shape[1]:
            self._halves[half] = with_upper_products(self._halves[half], rows)

    def _lay_together_if_many(self) -> None:
        """Lay the halves together once there are many rows; these sums are the largest that is held."""
        if self._parted and self.count >= MANY * self.inputs:
            self._parted, self._halves = False, [self._whole(), None]

    def _whole(self) -> Tensor | None:
        first, second = self._halves
        return first if second is None else second if first is None else first.add_(second)

    def over(self, processes: Processes, device: torch.device) -> None:
        """Add what others have, so that all have the same sums, bit for bit; one that saw no input takes part with nothing."""
        if not processes.alone:
            self._with_others(processes, device)
        width, (first, second) = self._width, self._halves
        if first is not None and second is not None:
            second.add_(first)
            self.first = mirrored_(first)[:, :width, :width]
        whole = first if second is None else second
        self.gram = None if whole is None else mirrored_(whole)[:, :width, :width]
        self.crossed = None if self._mixed is None or not self.paired else self._mixed[:, :width, :width]
        self._halves, self._mixed = [None, None], None

    def _with_others(self, processes: Processes, device: torch.device) -> None:
        there = next((sums for sums in self._halves if sums is not None), None)
        shape = None if there is None else (tuple(there.shape), there.dtype)
        everyone = processes.gathered((self.count, self.paired, self.known, self._width, shape))
        counts, paired, known, widths, shapes = zip(*everyone, strict=True)
        self.count, self.paired, self.known, self._width = sum(counts), all(paired), all(known), max(widths)
        found = next((entry for entry in shapes if entry is not None), None)
        if found is None:
            return
        self._lay_together_if_many()  # with all rows counted: where one has many, all have
        crossed = any(processes.gathered(self._mixed is not None))
        nothing = torch.zeros(found[0], dtype=found[1], device=device)
        for half in range(2) if self._parted else range(1):
            if any(processes.gathered(self._halves[half] is not None)):
                own = self._halves[half]
                self._halves[half] = processes.summed(nothing if own is None else own)
        if crossed and self.paired:
            self._mixed = processes.summed(nothing if self._mixed is None else self._mixed)
        else:
            self._mixed = None
