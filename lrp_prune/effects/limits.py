"""Limits by name: how much worse each thing may become."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

ALLOWED: Mapping[str, float] = {"*": 0.02}
"""How much worse things may become if nothing else is said, as a share: of the perplexity of every kind of text."""


def checked_limits(allowed: Mapping[str, float] | float, names: Sequence[str]) -> dict[str, float]:
    """Limits by pattern; those that no name matches are refused.

    Raises:
        ValueError: for a limit that is no share, or a pattern that matches nothing.
    """
    limits = dict(allowed) if isinstance(allowed, Mapping) else {"*": allowed}
    for pattern, limit in limits.items():
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 0:
            raise ValueError(f"allowed[{pattern!r}] must be a share of at least 0, 0.02 for 2 %, got {limit!r}")
        if names and not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"allowed[{pattern!r}] matches none of {', '.join(names)}")
    return limits


def limit_of(name: str, limits: Mapping[str, float], directed: bool = True) -> float | None:
    """The limit of a name: its own, else that of the longest pattern; a pattern ``"*"`` is for what is directed only."""
    if name in limits:
        return limits[name]
    found = [pattern for pattern in limits if fnmatchcase(name, pattern) and (directed or pattern != "*")]
    return limits[max(found, key=len)] if found else None
