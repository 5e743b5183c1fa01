"""Processes that recalibrate one model together, each on batches of its own: as one process on all of them.

What a layer gets depends on the scales of the layers before it, so that its moments have to be those of all processes before the
next layer runs: they are summed in the forward, product by product.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrp_prune.distributed.sharding import agreeing, all_gathered, all_reduced
from lrp_prune.pruning.moments import PairedMoments

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Turn = tuple[Hashable, int]
"""What is summed, and how many channels it has."""


class Processes:
    """Those that work together.

    Args:
        mesh: of those that a model is divided among, or that have one each; None: this one works alone.
        what: they do, as errors call it.
        in_step: whether they run one model together, each as often as the others.
    """

    def __init__(self, mesh: "DeviceMesh | None", what: str = "recalibrating", in_step: bool = False) -> None:
        self._mesh, self._what, self.in_step = mesh, what, in_step

    @classmethod
    def of_run(cls, device: torch.device, what: str = "recalibrating") -> "Processes":
        """All of a run, each with a whole model on a device."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return cls(None, what)
        from torch.distributed.device_mesh import init_device_mesh

        kind = "cpu" if torch.distributed.get_backend() == "gloo" else device.type
        return cls(init_device_mesh(kind, (torch.distributed.get_world_size(),)), what)

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self._mesh is None

    def gathered(self, value: Any) -> list[Any]:
        """A small plain value of each, in the same order everywhere."""
        return [value] if self._mesh is None else all_gathered(value, self._mesh)

    def summed(self, values: Tensor) -> Tensor:
        """The sum of tensors, the same in each."""
        return values if self._mesh is None else all_reduced(values, self._mesh)

    def check_numbers(self, batches: int) -> None:
        """Refuse other numbers of batches in processes that run one model together.

        Raises:
            ValueError: in all of them, with all numbers.
        """
        numbers = self.gathered(batches) if self.in_step else [batches]
        if len(set(numbers)) > 1:
            raise ValueError(
                f"the processes have {numbers} batches: they run a model together that is divided among them, so give each the "
                "same number"
            )

    def share(self, entries: int) -> slice:
        """Which of so many entries are this one's, where each does a part."""
        rank, size = self._place
        return slice(rank * entries // size, (rank + 1) * entries // size)

    def half(self, index: int) -> int:
        """Of two halves of all batches, each of one sample, the one that this one's are of: 0 or 1."""
        return (index + self._place[0]) % 2

    @property
    def _place(self) -> tuple[int, int]:
        """Which one this is, and of how many."""
        rank, size = 0, 1
        for axis, place in enumerate(self._mesh.get_coordinate() or () if self._mesh is not None else ()):
            number = self._mesh.size(axis) if self._mesh is not None else 1
            rank, size = rank * number + place, size * number
        return rank, size

    def agreeing(self) -> AbstractContextManager[None]:
        """What fails in one of them fails in all, see :func:`lrp_prune.distributed.sharding.agreeing`."""
        return agreeing(self._mesh, self._what)


class Turns:
    """Which moments are summed over all processes in a forward, and in which order.

    All make the same sums, whatever happens in one of them: what one leaves out, it takes part in with nothing as soon as it is
    at a later one, or at the end.

    Args:
        processes: those that work together.
        seen: what this one's forward had, in order. What others have not as often, or in another order, is in no sum.
    """

    def __init__(self, processes: Processes, seen: Sequence[Turn]) -> None:
        self._processes = processes
        everyone = [list(theirs) for theirs in processes.gathered(list(seen))]
        counts = [Counter(theirs) for theirs in everyone]
        common = [[turn for turn in theirs if len({count[turn] for count in counts}) == 1] for theirs in everyone]
        first = next((index for index, same in enumerate(zip(*common, strict=True)) if len(set(same)) > 1), None)
        self._turns = common[0][:first]
        self._next = 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """The time of one forward."""
        self._next = 0
        try:
            yield
        finally:
            self._skip(len(self._turns))

    def summed(self, key: Hashable, moments: PairedMoments) -> PairedMoments | None:
        """The moments of all processes; None if not all of them have this.

        Args:
            key: what it is.
            moments: of this process, in this forward.
        """
        turn = (key, moments.channels)
        if self._processes.alone:
            return moments if turn in self._turns else None
        if turn not in self._turns[self._next :]:
            return None
        self._skip(self._turns.index(turn, self._next))
        self._next += 1
        return moments.over(self._processes.summed)

    def _skip(self, until: int) -> None:
        """Take part with nothing in what comes before."""
        for _, channels in self._turns[self._next : until] if not self._processes.alone else ():
            PairedMoments(channels).over(self._processes.summed)
        self._next = max(self._next, until)
