"""A forward without data: how many bytes it keeps, of a model that may be on the meta device."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lrp_prune.attribution.observers import ObserverTable
from lrp_prune.engine.composites import composite_of
from lrp_prune.engine.propagation import propagating
from lrp_prune.engine.rules import Call
from lrp_prune.engine.uses import Product, WeightUses
from lrp_prune.models.batches import mapped
from lrp_prune.models.calling import run
from lrp_prune.models.outputs import logits_of
from lrp_prune.models.states import undisturbed
from lrp_prune.names import class_name
from lrp_prune.planning.live import Live
from lrp_prune.pruning.methods import Collects
from lrp_prune.pruning.products import ComputedUses


def is_shape(batch: Any) -> bool:
    """Whether a batch is given by its shape alone, samples and tokens."""
    return isinstance(batch, tuple) and len(batch) == 2 and all(isinstance(entry, int) for entry in batch)


def kept_by_a_forward(runner: "Running", batch: Any, dtype: torch.dtype | None) -> tuple[int, int]:
    """Bytes that a forward keeps for the backward pass, without the weights; and of the logits among them."""
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    logits, own = _run_without_data(runner, batch, dtype, saving)
    keep(logits)
    total = sum(size for storage, (size, _) in kept.items() if storage not in own)
    return total, logits.untyped_storage().nbytes()


def held_by_a_forward(runner: "Running", batch: Any, dtype: torch.dtype | None) -> tuple[int, int]:
    """Bytes that a forward that nothing goes back through holds at most, without the weights; and of the logits among them."""
    live = Live()
    logits, _ = _run_without_data(runner, batch, dtype, live)
    return live.peak, logits.untyped_storage().nbytes()


def _run_without_data(
    runner: "Running", batch: Any, dtype: torch.dtype | None, watching: AbstractContextManager[Any]
) -> tuple[Tensor, set[int]]:
    """The logits of a forward without data, and the storages of the model's own tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):

        def without_data(tensor: Tensor) -> Tensor:
            kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            made = torch.empty(tensor.shape, dtype=kind, device="cpu")
            return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

        state = {name: without_data(entry) for name, entry in [*runner.named_parameters(), *runner.named_buffers()]}
        if is_shape(batch):
            given: Any = {"input_ids": torch.zeros(batch, dtype=torch.long, device="cpu")}
        else:
            given = mapped(batch, without_data)
        own = {entry.untyped_storage()._cdata for entry in state.values()}
        try:
            with undisturbed(runner), watching, torch.enable_grad(), _InAnyPrecision():  # type: ignore[no-untyped-call]  # torch's
                output = torch.func.functional_call(runner, state, (given,))
            return logits_of(output), own
        except Exception as error:
            raise ValueError(
                f"{class_name(runner.module)} cannot be run without data ({type(error).__name__}: {error}): leave out batch="
            ) from error


class _InAnyPrecision(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Products of groups of rows are made in any precision, as they are with data: without, torch takes bfloat16 alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
            return func(*args, **kwargs)
        taken = [
            entry.to(torch.bfloat16) if torch.is_tensor(entry) and entry.is_floating_point() else entry
            for entry in args
        ]
        return func(*taken, **kwargs).to(args[0].dtype)


class Running(nn.Module):
    """Runs :attr:`module` in some way."""

    module: nn.Module


class Collecting(Running):
    """Runs a module as a collection does."""

    def __init__(self, module: nn.Module, collected: Collects, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.module, self.collected, self.options = module, collected, options

    def forward(self, batch: Any) -> Any:
        statistic = self.collected.statistic
        options = {"statistic": statistic, "accumulate_on": None, "matmul_dtype": "auto", **self.options}
        table = ObserverTable(self.module, **options)
        uses = WeightUses(table.observers, table.tracer)
        composite, needed = composite_of(self.collected.composite), table.backward_needed
        with propagating(
            self.module, composite, None, "ignore", uses, tracer=table.tracer, kept=table.kept, backward=needed
        ):
            return run(self.module, batch)


class Comparing(Running):
    """Runs a module as recalibration does, and counts what it keeps of the outputs."""

    def __init__(self, module: nn.Module, names: set[str]) -> None:
        super().__init__()
        self.module, self.names = module, names
        self.entries = self.bytes = self.largest = 0

    def forward(self, batch: Any) -> Any:
        uses = _Outputs(self)
        with propagating(self.module, composite_of("gradient"), None, "ignore", uses, named=False, backward=False):
            return run(self.module, batch)


class _Outputs(ComputedUses):
    """Products as recalibration makes them."""

    def __init__(self, runner: Comparing) -> None:
        super().__init__()
        self._runner = runner

    def _made(self, call: Call, found: Product, result: Tensor) -> None:
        if found.origin.name in self._runner.names:
            self._runner.entries += result.numel()
            self._runner.bytes += result.nbytes
            self._runner.largest = max(self._runner.largest, result.numel())
