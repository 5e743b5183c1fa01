"""What a compensation takes: a forward without data, in which each stage's layers, outputs and held activations are counted."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lrp_prune.engine.call import Call
from lrp_prune.engine.composites import composite_of
from lrp_prune.engine.forms import Convolution
from lrp_prune.engine.propagation import propagating
from lrp_prune.engine.uses import Product
from lrp_prune.models.calling import run
from lrp_prune.planning.dry_run import Running, kept_by_a_forward
from lrp_prune.pruning.compensation import Compensation
from lrp_prune.pruning.compensation.inputs import ROOM
from lrp_prune.pruning.compensation.stages import Watched, made_of, stages_of
from lrp_prune.pruning.compensation.systems import MANY
from lrp_prune.pruning.compensation.together import laid_number
from lrp_prune.pruning.products import ComputedUses

_WIDE = 4  # bytes: sums, and what is solved, are in float32
_GRAMS, _CROSSED = 5, 2
"""Matrices as large as a Gram matrix that are there while a layer is solved for: sums, damped, scaled, a factor; and crossed sums
and what is mixed of them."""
_HALVES = 1
"""Of those what is known of one half of the samples, to choose the damping by."""
_WEIGHTS = 12
"""Matrices as large as the weight, likewise: of conjugate gradients, of the solution without a mask, and what is compared."""


@dataclass(frozen=True)
class CompensationPlan:
    """Bytes that compensation takes beside the model."""

    device: int
    """A stage's dense weights, one group's Gram matrices, and what a forward holds or a solution takes."""
    host: int
    """What stages gave to the reference batches, as far as later ones are made of it, and what the layers of one got."""


@dataclass
class _Layer:
    """A layer's system: ``groups`` of ``[inputs, inputs]``, and its rows in one batch."""

    groups: int
    inputs: int
    outputs: int
    rows: int
    size: int

    @property
    def gram(self) -> int:
        """Bytes of one Gram matrix, with a one beside the inputs."""
        return self.groups * (self.inputs + 1) ** 2 * _WIDE

    @property
    def summing(self) -> int:
        """Bytes of the rows of a batch, as they come and in float32, of the pruned and the dense model."""
        return 2 * self.groups * self.rows * (self.inputs + 1) * (self.size + _WIDE)

    def solving(self, both: bool, halves: bool, batches: int) -> int:
        """Bytes while it is solved for, with products of the dense model's inputs or without, and of halves of few rows."""
        grams = _GRAMS + _CROSSED if both else _GRAMS
        grams += _HALVES * (halves and batches * self.rows < MANY * self.inputs)
        return grams * self.gram + _WEIGHTS * self.groups * self.outputs * (self.inputs + 1) * _WIDE


@dataclass
class _StagePlan:
    """What a stage has, and what a batch takes in it."""

    weights: int = 0
    held: int = 0
    outputs: int = 0
    inputs: int = 0
    results: int = 0
    """Of its layers before the last one, which are given again."""
    last: int = 0
    layers: list[_Layer] = field(default_factory=list)


class _Staged(Running):
    """Runs a module as compensation does, and counts stage by stage."""

    def __init__(self, module: nn.Module, scored: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.module, self.names = module, set(scored)
        weights = {name: entry for name, entry in scored.items() if isinstance(entry, nn.Parameter)}
        self.stages = stages_of(module, weights)
        self.plans = {name: _StagePlan() for name in self.stages}
        self.watched = Watched(self.stages)
        self.held = self.largest = 0
        self._running: list[str] = []
        self._known: dict[int, Tensor] = {}
        self._before_last: Tensor | None = None

    def forward(self, batch: Any) -> Any:
        for entry in (*self.module.parameters(), *self.module.buffers()):
            self._known[entry.untyped_storage()._cdata] = entry
        handles = []
        for name, stage in self.stages.items():
            self.plans[name].weights = sum(entry.nbytes for entry in stage.parameters())
            handles.append(stage.register_forward_pre_hook(self._before(name)))
            handles.append(stage.register_forward_hook(self._after(name)))
        try:
            with (
                torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor),
                self.watched.watching(),
                propagating(self.module, composite_of("gradient"), None, "ignore", _Products(self), named=False),
            ):
                return run(self.module, batch)
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str) -> Any:
        return lambda *_: self._running.append(name)

    def _after(self, name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self._running.remove(name)
            self.plans[name].outputs += sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

        return hook

    def keep(self, tensor: Tensor) -> Tensor:
        """Note what a forward holds."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = tensor
            self.held += storage.nbytes()
            for name in self._running:
                self.plans[name].held += storage.nbytes()
        return tensor

    def product(self, found: Product, result: Tensor) -> None:
        """Note a product that masks may be about."""
        self.largest = max(self.largest, result.numel())
        for name in self._running:
            plan = self.plans[name]
            plan.layers.append(_layer_of(found, result))
            plan.inputs += 0 if found.activation is self._before_last else found.activation.nbytes
            plan.results, plan.last = plan.results + plan.last, result.nbytes
        self._before_last = found.activation


def _layer_of(found: Product, result: Tensor) -> _Layer:
    weight, form, size = found.weight, found.form, found.activation.element_size()
    if isinstance(form, Convolution):
        rows, inputs = result.numel() // max(weight.shape[0], 1), math.prod(weight.shape[1:])
        return _Layer(form.groups, inputs, weight.shape[0] // form.groups, rows, size)
    shape = weight.shape[-2:]
    if weight.dim() == 2 and form.channel_dim is not None:
        inputs, outputs = weight.shape[form.in_axis], weight.shape[form.out_axis]
        return _Layer(1, inputs, outputs, found.activation.numel() // max(inputs, 1), size)
    # Of a stack one layer, which may get all there is.
    return _Layer(1, max(shape), max(shape), found.activation.numel() // max(min(shape), 1), size)


class _Products(ComputedUses):
    """Products as compensation makes them."""

    def __init__(self, runner: _Staged) -> None:
        super().__init__()
        self._runner = runner

    def _made(self, call: Call, found: Product, result: Tensor) -> None:
        self._runner.keep(result)
        if found.origin.name in self._runner.names:
            self._runner.product(found, result)


def planned(
    module: nn.Module,
    scored: Mapping[str, Tensor],
    batch: Any,
    dtype: torch.dtype | None,
    way: Compensation,
    batches: int,
) -> CompensationPlan:
    """Plan a compensation from shapes alone.

    Args:
        module: on any device.
        scored: what may be pruned.
        batch: one of the reference batches, or its shape.
        dtype: of the weights.
        way: how.
        batches: how many there are.

    Raises:
        ValueError: the module cannot be run without data.
    """
    runner = _Staged(module, scored)
    _, logits = kept_by_a_forward(runner, batch, dtype)
    order = [name for name in runner.watched.order if runner.watched.calls[name] == 1]
    number = laid_number(runner.largest, batches)
    both, halves = way.dense > 0, way.damping is None
    whole = min(number, 2) * runner.held + 2 * logits  # two batches are tried as one, without logits
    device = whole
    for name in order:
        plan = runner.plans[name]
        for layer in plan.layers:
            forward = number * (plan.held + 2 * plan.outputs + layer.summing)
            summing, solving = (2 + halves) * layer.gram + forward, layer.solving(both, halves, batches)
            device = max(device, plan.weights + max(summing, solving))
    return CompensationPlan(device, _kept(runner, order, both, batches))


def _kept(runner: _Staged, order: list[str], both: bool, batches: int) -> int:
    """The most that is kept of what stages gave to batches, and of what layers of one stage got in the dense model, or give."""
    needed = made_of([runner.watched], order)
    last = {
        name: max((index for index, user in enumerate(order) if name in needed[user]), default=-1) for name in order
    }
    sizes = {name: runner.plans[name].outputs for name in order}

    def alive(at: int) -> int:
        return sum(sizes[name] for name in order[:at] if last[name] >= at)

    found = 0
    for index, name in enumerate(order):
        before, after = alive(index), alive(index + 1)
        dense = max(before + sizes[name], after) if both else 0
        kept = max(runner.plans[name].inputs if both else 0, runner.plans[name].results)
        room = min(ROOM, batches * kept)
        found = max(found, batches * (dense + before) + room, batches * ((after if both else 0) + before + sizes[name]))
    return found
