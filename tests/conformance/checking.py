"""All columns of one type for one task."""

import time
from collections.abc import Callable
from typing import Any

from tests.conformance.columns import relevance, units, weights
from tests.conformance.columns.case import Case
from tests.conformance.columns.verdict import FAILED, Verdict

COLUMNS: dict[str, Callable[[Case], Verdict]] = {
    "forward": relevance.forward,
    "conserves": relevance.conserves,
    "attnlrp": relevance.attnlrp,
    "weights": weights.weights,
    "neurons": units.neurons,
    "heads": units.heads,
    "blocks": units.blocks,
    "prunes": weights.prunes,
    "loads": weights.loads,
}
"""Name -> what is looked at."""


def check(mapping: str, name: str, columns: list[str] | None = None) -> dict[str, Any]:
    """What the table says about a type for a task, as plain values.

    A type that cannot be built, or that no batch is found for, has no columns but ``built``, which says why.
    """
    began = time.perf_counter()
    entry: dict[str, Any] = {"mapping": mapping, "type": name}
    case = Case(mapping, name)
    try:
        entry["variants"] = [variant.name for variant in case.variants]
        entry["inputs"] = sorted(case.first.batch)
        entry["class"] = type(case.first.model).__name__
    except Exception as error:
        return {**entry, "built": described(error), "seconds": round(time.perf_counter() - began, 2)}
    entry["columns"] = {column: verdict_of(COLUMNS[column], case) for column in columns or COLUMNS}
    return {**entry, "seconds": round(time.perf_counter() - began, 2)}


def verdict_of(look: Callable[[Case], Verdict], case: Case) -> dict[str, Any]:
    """What a column says of a type, also where looking at it ends in an error."""
    try:
        return look(case).to_dict()
    except Exception as error:
        return Verdict(FAILED, described(error)).to_dict()


def described(error: Exception) -> str:
    """An error in a line of the table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(lines)[:400]}"
