"""Checks of plain arguments, whose errors name the argument, its value and what would do."""

from typing import Any


def check_integer(name: str, value: Any, least: int) -> int:
    """An integer of at least so much.

    Raises:
        ValueError: for anything else, also for True.

    Example:
        >>> check_integer("rounds", 2, 1)
        2
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return value


def check_number(name: str, value: Any, interval: str) -> float:
    """A number in an interval, as it is written: with brackets where the end is part of it.

    Raises:
        ValueError: for anything else, also for True, and for what is no number (nan).

    Example:
        >>> check_number("density", 0.5, "(0, 1]")
        0.5
        >>> check_number("density", 0, "(0, 1]")
        Traceback (most recent call last):
            ...
        ValueError: density must be a number in (0, 1], got 0
    """
    low, high = map(float, interval[1:-1].split(","))
    if not isinstance(value, bool) and isinstance(value, int | float):
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if above and below:
            return float(value)
    raise ValueError(f"{name} must be a number in {interval}, got {value!r}")


def check_flag(name: str, value: Any) -> bool:
    """True or False, and nothing that is merely taken for one of them.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def check_patterns(name: str, value: Any) -> None:
    """None or a list of name patterns; a single string would be read letter by letter.

    Raises:
        ValueError: for anything else.
    """
    wrong = isinstance(value, str | bytes) or not hasattr(value, "__iter__")
    if value is not None and (wrong or not all(isinstance(pattern, str) for pattern in value)):
        raise ValueError(f"{name} must be a list of name patterns such as ['*.mlp'], got {value!r}")
