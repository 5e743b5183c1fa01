"""What is other than it was."""

from typing import NamedTuple

from tests.conformance.record import Entries, failures


class Changes(NamedTuple):
    """Lines to print, each about one type.

    Args:
        worse: what passed, or was not there, and fails; what is gone.
        better: what failed and passes, or fails in fewer columns.
        new: types that nothing was known of, and that pass.
    """

    worse: list[str]
    better: list[str]
    new: list[str]

    def __str__(self) -> str:
        parts = [("Worse", self.worse), ("Better", self.better), ("New", self.new)]
        lines = [
            line for title, entries in parts if entries for line in (f"{title}:", *(f"  {entry}" for entry in entries))
        ]
        return "\n".join(lines) or "Nothing has changed."


def compared(stored: Entries, found: Entries, whole: bool = True) -> Changes:
    """Compare results with those of an earlier version.

    Args:
        stored: the earlier ones.
        found: the present ones.
        whole: whether all types were looked at, so that one that is not there is gone.
    """
    changes = Changes([], [], [])
    for key, entry in found.items():
        now = failures(entry)
        if key not in stored:
            told = "; ".join(f"{column}: {why}" for column, why in now.items())
            (changes.worse if now else changes.new).append(f"{key} (new){f' fails in {told}' if told else ''}")
            continue
        before = failures(stored[key])
        lost = [column for column in now if column not in before and not ("built" in before and column != "built")]
        gained = [column for column in before if column not in now]
        if lost:
            changes.worse.append(f"{key} fails in {'; '.join(f'{column}: {now[column]}' for column in lost)}")
        if gained and "built" not in now:
            changes.better.append(f"{key} passes {', '.join(gained)}")
    gone = [key for key in stored if key not in found] if whole else []
    changes.worse.extend(f"{key} is gone" for key in gone)
    return changes
