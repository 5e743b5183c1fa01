"""Counting the bytes that torch's own allocator hands out."""

import gc
from collections.abc import Callable
from typing import Any


def allocated(function: Callable[[], Any]) -> tuple[Any, int, int]:
    """A function's result, and the bytes of tensors at its end and at most, on the CPU; also inside of torch."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
        gc.collect()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return result, now, most
