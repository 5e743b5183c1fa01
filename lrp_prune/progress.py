"""Progress bars: of one process, gone when they are done."""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from tqdm import tqdm

Progress = Callable[[str, float], AbstractContextManager[Callable[[int], Any]]]
"""From what is done and how many steps that takes (infinite: nobody knows) to a context that yields what is told of steps."""


def is_first() -> bool:
    """Whether this process is the one that shows something, of those that run together."""
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not running or torch.distributed.get_rank() == 0


@contextmanager
def bar(what: str, total: float) -> Iterator[Callable[[int], Any]]:
    """A bar on the terminal, by the first process."""
    count = None if total == float("inf") else int(total)
    with tqdm(desc=what, total=count, disable=not is_first(), leave=False) as shown:
        yield shown.update


@contextmanager
def no_bar(what: str, total: float) -> Iterator[Callable[[int], Any]]:
    """Nothing is shown."""
    yield lambda steps: None


class Counted:
    """Batches, each of which is told of when the next is asked for."""

    def __init__(self, batches: Iterable[Any], advance: Callable[[int], Any]) -> None:
        self._batches, self._advance = batches, advance

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            yield batch
            self._advance(1)


def number_of(batches: Iterable[Any]) -> float:
    """How many batches there are; infinite if they do not say."""
    try:
        return len(batches) if isinstance(batches, Sized) else float("inf")
    except TypeError:  # a loader of what can only be gone through
        return float("inf")
