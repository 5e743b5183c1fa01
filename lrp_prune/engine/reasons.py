"""Reasons by number: why units cannot be removed, and where they end, of as many units as a model has."""

import torch
from torch import Tensor

_NONE = -1


class Reasons:
    """One reason for each of some numbers, the first that was given.

    Example:
        >>> reasons = Reasons()
        >>> reasons.note(torch.tensor([3, 5]), "a"); reasons.note(torch.tensor([5, 6]), "b")
        >>> reasons.of(torch.tensor([6, 5, 4])), reasons.of(torch.tensor([4]))
        (['b', 'a'], [])
    """

    def __init__(self) -> None:
        self._texts: dict[str, int] = {}
        self._of = torch.empty(0, dtype=torch.int32, device="cpu")

    def note(self, numbers: Tensor, reason: str) -> None:
        """Give a reason to those of the numbers that are above 0 and have none."""
        numbers = numbers.to("cpu").reshape(-1).long()
        numbers = numbers[numbers > 0]
        if not len(numbers):
            return
        missing = int(numbers.max()) + 1 - len(self._of)
        if missing > 0:
            more = torch.full((max(missing, len(self._of)),), _NONE, dtype=torch.int32, device="cpu")
            self._of = torch.cat([self._of, more])
        free = numbers[self._of[numbers] == _NONE]
        self._of[free] = self._texts.setdefault(reason, len(self._texts))

    def of(self, numbers: Tensor) -> list[str]:
        """The reasons that some of the numbers have, each once, in the order of the numbers."""
        numbers = numbers.to("cpu").reshape(-1).long()
        numbers = numbers[(numbers > 0) & (numbers < len(self._of))]
        found = self._of[numbers]
        texts = list(self._texts)
        return [texts[index] for index in dict.fromkeys(found[found != _NONE].tolist())]

    def items(self) -> list[tuple[Tensor, str]]:
        """Each reason with the numbers that have it."""
        return [((self._of == index).nonzero()[:, 0], reason) for reason, index in self._texts.items()]
