"""Whether the text of an answer shows a behaviour, and where."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Span = tuple[int, int]
Shows = str | Callable[[str], float]
Where = Callable[[str], Iterable[Span]]
IGNORED, SHOWN = -100, 0.5


class Judge:
    """A pattern that is searched for, which also says where; or a function from a text to how much of the behaviour it shows.

    Args:
        shows: a regular expression, or from a text to True or False, or a number in [0, 1].
        where: from a text to the stretches ``(first, last)`` of characters that show it; of a pattern its matches. None:
            all of it.

    Raises:
        ValueError: for what is neither, or a pattern that is no regular expression.

    Example:
        >>> judge = Judge(r"^(Sure|Certainly)")
        >>> judge("Sure, I can."), judge("I can."), list(judge.where("Sure, I can."))
        (1.0, 0.0, [(0, 4)])
    """

    def __init__(self, shows: Shows, where: Where | None = None) -> None:
        if isinstance(shows, str):
            try:
                pattern = re.compile(shows)
            except re.error as error:
                raise ValueError(f"shows={shows!r} is no regular expression: {error}") from error
            self._shows: Callable[[str], float] = lambda text: pattern.search(text) is not None
            where = where or (lambda text: [match.span() for match in pattern.finditer(text)])
        elif callable(shows):
            self._shows = shows
        else:
            raise ValueError(
                f"shows must be a regular expression or a function of an answer's text, got {type(shows).__name__}"
            )
        self.where = where

    def __call__(self, text: str) -> float:
        """How much of the behaviour a text shows."""
        return float(self._shows(text))

    def labels(self, answer: Sequence[int], decode: Callable[..., str]) -> list[int]:
        """The tokens of an answer that show it, -100 for all others."""
        if self.where is None:
            return list(answer)
        spans = [span for span in self.where(decode(answer)) if span[1] > span[0]]
        ends = [len(decode(answer[: place + 1])) for place in range(len(answer))]
        return [
            token if any(first < end and start < last for first, last in spans) else IGNORED
            for token, start, end in zip(answer, [0, *ends[:-1]], ends, strict=True)
        ]


def listed(sets: Any, argument: str) -> list[Any]:
    """What was given, as a list; one text is none."""
    if isinstance(sets, str) or not isinstance(sets, Iterable):
        raise ValueError(f"{argument} must be a list, got {type(sets).__name__}")
    return list(sets)
