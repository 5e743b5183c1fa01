"""What a column says about a type."""

from dataclasses import asdict, dataclass
from typing import Any

PASSED, FAILED, REFUSED, ABSENT = "passed", "failed", "refused", "absent"


@dataclass(frozen=True)
class Verdict:
    """One entry of the table.

    Args:
        status: ``"passed"``; ``"failed"``; ``"refused"``: the library said by itself what it does not do, and why; ``"absent"``:
            there is nothing of the kind.
        why: what failed, why it was refused, or what there is to know.
        figure: what was measured.
    """

    status: str
    why: str = ""
    figure: float | None = None

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return self.status != FAILED

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {name: value for name, value in asdict(self).items() if value not in ("", None)}


def within(figure: float, limit: float, what: str) -> Verdict:
    """Passed if a figure is at most a limit; not a number is neither."""
    return Verdict(PASSED if figure <= limit else FAILED, "" if figure <= limit else f"{what}: {figure:.3g}", figure)


def joined(verdicts: dict[str, Verdict]) -> Verdict:
    """Of several variants of one thing: the first that failed, else the worst that passed; says of which variant."""
    for name, verdict in verdicts.items():
        if not verdict.good:
            return Verdict(verdict.status, f"{name}: {verdict.why}" if name else verdict.why, verdict.figure)
    figures = [verdict.figure for verdict in verdicts.values() if verdict.figure is not None]
    whys = list(dict.fromkeys(verdict.why for verdict in verdicts.values() if verdict.why))
    return Verdict(next(iter(verdicts.values())).status, "; ".join(whys), max(figures, default=None))
