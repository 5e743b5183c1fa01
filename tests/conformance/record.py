"""What has been found so far, one line a type, so that a run that was stopped goes on."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Entries = dict[str, dict[str, Any]]
"""``"mapping/type"`` -> what :func:`~tests.conformance.checking.check` found."""


def versions() -> dict[str, str]:
    """Of what a result depends on; a result of other versions is none."""
    return {name: version(name) for name in ("lrp-prune", "torch", "transformers")}


def code() -> str:
    """A digest of this library's code."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "lrp_prune").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Record:
    """A file of results.

    Args:
        path: of the file; a new one is made.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._versions, self._code = path, versions(), code()
        path.parent.mkdir(parents=True, exist_ok=True)

    def entries(self) -> Entries:
        """The last result of each type, if it is of these versions."""
        if not self._path.exists():
            return {}
        found: Entries = {}
        for line in self._path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the run was stopped while it was written
                continue
            if entry.pop("versions") == self._versions:
                found[f"{entry['mapping']}/{entry['type']}"] = entry
        return found

    def add(self, entry: dict[str, Any]) -> None:
        """Write one result."""
        with self._path.open("a") as file:
            file.write(json.dumps({**entry, "versions": self._versions, "code": self._code}) + "\n")

    def clear(self) -> None:
        """Begin anew."""
        self._path.unlink(missing_ok=True)


def passed(entry: dict[str, Any]) -> bool:
    """Whether a type was built and nothing failed."""
    return "columns" in entry and not failures(entry)


def failures(entry: dict[str, Any]) -> dict[str, str]:
    """Column -> what is wrong; of a type that was not built the reason, as the column ``built``."""
    if "columns" not in entry:
        return {"built": entry["built"]}
    return {name: verdict.get("why", "") for name, verdict in entry["columns"].items() if verdict["status"] == "failed"}
