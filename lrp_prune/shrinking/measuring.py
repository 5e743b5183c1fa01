"""Time and memory of the masked model and of the smaller one, measured in turn."""

import time
import weakref
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrp_prune.models.batches import to_device
from lrp_prune.shrinking.cuts import Swap
from lrp_prune.shrinking.proof import Proof, Run, unrecorded


class Speed(NamedTuple):
    """What was measured of a forward on the first batch, without gradients.

    Args:
        before: seconds of the masked model, the median.
        after: of the smaller one.
        ratio: the median of both of each turn: how many times faster the smaller one is.
        memory_before: bytes that the masked model's forward held at most, besides the weights.
        memory_after: that of the smaller one.
    """

    before: float
    after: float
    ratio: float
    memory_before: int
    memory_after: int


def measured(module: nn.Module, swaps: Sequence[Swap], proof: Proof, run: Run, times: int) -> Speed:
    """Run the first batch by both models, in turn, so many times; the smaller one is there at the end.

    Args:
        module: the smaller model.
        swaps: what makes it the masked one, and back.
        proof: has the batches.
        run: how a batch is run.
        times: how often.
    """
    device = next(module.parameters()).device
    batch = to_device(proof.batches[0], device)

    def forward() -> None:
        run(module, batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def seconds() -> float:
        forward()  # what has just been swapped is in no cache
        start = time.perf_counter()
        forward()
        return time.perf_counter() - start

    def masked(function: Callable[[], Any]) -> Any:
        try:
            for swap in reversed(swaps):
                swap.back()
            return function()
        finally:
            for swap in swaps:
                swap.put()

    large, small = [], []
    with unrecorded(module), torch.no_grad():
        held = masked(lambda: _held(forward, device)), _held(forward, device)
        for turn in range(times):
            if turn % 2:  # neither is always the first
                large.append(masked(seconds))
                small.append(seconds())
            else:
                small.append(seconds())
                large.append(masked(seconds))
    ratio = median(before / after for before, after in zip(large, small, strict=True))
    return Speed(median(large), median(small), ratio, *held)


def _held(function: Callable[[], None], device: torch.device) -> int:
    """Bytes of tensors that a function holds at most, besides those that are there."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        there = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - there
    with _Live() as live:
        function()
    return int(live.most)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts the bytes of tensors that are made and alive at the same time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.most = self._now = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and _storage(each) not in given:
                self._count(each)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = storage.nbytes()
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self._now -= self._known.pop(key)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
