"""Collecting some weights at a time: several passes over the batches, for models whose relevance does not fit at once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lrp_prune.distributed.sharding import in_step


class Collecting(Protocol):
    """What takes batches one by one."""

    def update(self, batch: Any) -> None:
        """Add one batch."""


class Table(Protocol):
    """The sums of many weights."""

    active: set[str] | None
    """The names of those that are collected; None for all."""

    def park(self, names: set[str], device: torch.device) -> None:
        """Finish the sums of these weights and keep them on that device."""


class OfWeights(Collecting, Protocol):
    """What collects the relevance of weights, some at a time if need be."""

    num_samples: int
    table: Table

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """All weights that are scored, by name."""


def check_chunks(chunks: int, batches: Iterable[Any], granularity: str | Sequence[str]) -> None:
    """Raise what is wrong with a number of passes, before anything is run."""
    if isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1:
        raise ValueError(f"chunks must be a whole number of at least 1, got {chunks!r}")
    if chunks > 1 and granularity != "weight":
        raise ValueError(
            f"chunks={chunks} divides the weights, but the relevance is about {granularity}s: leave it at 1"
        )
    if chunks > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"chunks={chunks} goes through the batches {chunks} times, but {type(batches).__name__} can be gone through once: "
            "pass a list or a loader"
        )


def in_runs(parameters: Mapping[str, Tensor], chunks: int) -> list[set[str]]:
    """The names in so many runs of about as many entries each, in the model's order; fewer if there are fewer names."""
    total, before = sum(parameter.numel() for parameter in parameters.values()), 0
    parts: dict[int, set[str]] = {}
    for name, parameter in parameters.items():
        middle = before + parameter.numel() / 2
        parts.setdefault(min(int(middle * chunks / max(total, 1)), chunks - 1), set()).add(name)
        before += parameter.numel()
    return list(parts.values())


def collect(collecting: Collecting, batches: Iterable[Any], model: nn.Module, chunks: int = 1) -> None:
    """Add all batches, once for each chunk of the weights (which only relevance of weights has).

    Raises:
        ValueError: if a later pass has another number of samples than the first.
    """
    if chunks == 1:
        for batch in in_step(batches, model):
            collecting.update(batch)
        return
    accumulator = cast(OfWeights, collecting)
    for names in in_runs(accumulator.parameters, chunks):
        with _only(accumulator, names):
            for batch in in_step(batches, model):
                accumulator.update(batch)


@contextmanager
def _only(accumulator: OfWeights, names: set[str]) -> Iterator[None]:
    """Collect these weights alone; then their sums leave the device."""
    before, accumulator.num_samples = accumulator.num_samples, 0
    table = accumulator.table
    table.active = names
    try:
        yield
    finally:
        table.active = None
    table.park(names, torch.device("cpu"))
    if before not in (0, accumulator.num_samples):
        raise ValueError(
            f"the batches held {before} samples when they were gone through first, and {accumulator.num_samples} later: pass "
            "batches that are the same each time"
        )
