"""Looks at every family of classifiers that timm and torchvision have, by a small model of each, and says what holds of it.

    python tests/conformance/vision.py                     # all; about an hour; goes on where it was stopped
    python tests/conformance/vision.py --only 'timm/xcit'
    python tests/conformance/vision.py --columns conserves # and only this; others are looked at by a later run
    python tests/conformance/vision.py --again             # once more what did not pass

What is found is kept in build/vision.jsonl. A run over everything writes docs/vision_families.md.
"""

import argparse
import fnmatch
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))
from tests.conformance.checking import described, verdict_of
from tests.conformance.columns import relevance, units, weights
from tests.conformance.columns.case import Case, Variant
from tests.conformance.columns.verdict import Verdict
from tests.conformance.record import ROOT, Record, failures, passed
from tests.conformance.workers import Failure, each
from tests.support.vision_families import built, families, variant, without_biases

COMMAND = "python tests/conformance/vision.py"


COLUMNS: dict[str, Callable[[Case], Verdict]] = {
    "forward": relevance.forward,
    "conserves": relevance.conserves,
    "attnlrp": relevance.attnlrp,
    "weights": weights.weights,
    "neurons": units.neurons,
    "heads": units.heads,
    "blocks": units.blocks,
}
HEADINGS = {
    "forward": "values of the forward are bit for bit the same in the mode as with gradients, or as without them",
    "conserves": "CP-LRP conserves: relevance of all roots sums up to the value to 1e-4 of it, in float64, without biases",
    "attnlrp": "AttnLRP has a rule for every operation, and relevance is finite",
    "weights": "every prunable weight has relevance, or is named with the reason why not",
    "neurons": "filters and hidden units: one goes with what makes it and all that reads it; or they are refused by name",
    "heads": "attention heads, likewise",
    "blocks": "layers that write onto a residual stream, likewise",
}


class Family(Case):
    """A family of a library, as a type for a task."""

    @cached_property
    def variants(self) -> list[Variant]:
        model, images = built(self.mapping, self.name)
        return [Variant("", without_biases(model), images, 1e-4)]  # type: ignore[arg-type]  # images, and no mapping

    @property
    def another(self) -> torch.Tensor:  # type: ignore[override]  # an image
        images: torch.Tensor = self.first.batch  # type: ignore[assignment]
        return torch.randn(images.shape, generator=torch.Generator().manual_seed(6), dtype=images.dtype)

    def fresh(self, biases: bool = False) -> nn.Module:
        model = built(self.mapping, self.name)[0]
        return model if biases else without_biases(model)


def check(library: str, family: str, columns: list[str]) -> dict[str, Any]:
    """What the table says about a family."""
    began = time.perf_counter()
    entry: dict[str, Any] = {"mapping": library, "type": family}
    case = Family(library, family)
    try:
        entry["class"] = variant(library, family)
        entry["side"] = case.first.batch.shape[-1]  # type: ignore[attr-defined]
        entry["columns"] = {column: verdict_of(COLUMNS[column], case) for column in columns}
    except Exception as error:
        entry["built"] = described(error)
    return {**entry, "seconds": round(time.perf_counter() - began, 1)}


def page(entries: dict[str, dict[str, Any]]) -> str:
    """What was found, in words and a table."""
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "timm", "torchvision"))
    shown = [name for name in COLUMNS if any(name in entry.get("columns", ()) for entry in entries.values())]
    command = COMMAND if len(shown) == len(COLUMNS) else f"{COMMAND} --columns {' '.join(shown)}"
    parts = [
        "# Families of vision models",
        "There is no code about any architecture in the library. Whether it works on those of timm and torchvision is looked at "
        "by a small variant of each family, made less deep where it is large, with random weights:",
        "\n".join(f"* **{name}**: {what}" for name, what in HEADINGS.items() if name in shown),
        "*None* counts as right: there is nothing of the kind to look at, or the library says by itself, with the reason, that "
        "it could not be taken out.",
    ]
    rows = [["library", "passed", "built", "all", *shown]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for library in ("timm", "torchvision"):
        own = [entry for entry in entries.values() if entry["mapping"] == library]
        looked = Counter(name for entry in own for name in entry.get("columns", ()))
        failed = Counter(name for entry in own if "columns" in entry for name in failures(entry))
        counts = sum(map(passed, own)), sum("columns" in entry for entry in own), len(own)
        less = Counter(
            name
            for entry in own
            for name, verdict in entry.get("columns", {}).items()
            if verdict["status"] in ("refused", "absent")
        )
        good = [
            f"{looked[name] - failed[name]} of {looked[name]}{f' ({less[name]} none)' if less[name] else ''}"
            for name in shown
        ]
        rows.append([library, *map(str, counts), *good])
    parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    parts.append(f"`{command}`; {date.today().isoformat()}; {versions}.")
    parts.append("## What does not pass, and what is left out")
    parts.append("\n".join(_told(entries)) or "Everything passes.")
    return "\n\n".join(parts) + "\n"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def _told(entries: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each failure and each refusal: column, reason, families."""
    found: dict[str, list[str]] = {}
    for key, entry in entries.items():
        reasons = failures(entry)
        for name, verdict in entry.get("columns", {}).items():
            if verdict["status"] in ("refused", "absent") and verdict.get("why"):
                why = re.sub(r"^[A-Z]\w+ has", "it has", verdict["why"])
                reasons[name] = f"refused: {why}"
        for name, why in reasons.items():
            found.setdefault(f"**{name}**: {why[:260]}", []).append(f"`{key}`")
    return [f"* {', '.join(keys)}: {why}" for why, keys in sorted(found.items())]


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = _options(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chosen = [pair for pair in families() if fnmatch.fnmatch("/".join(pair), options.only)]
    record = Record(options.record)
    if options.fresh:
        record.clear()
    known = record.entries()
    due = {
        pair: missing
        for pair in chosen
        if (missing := _missing(known.get("/".join(pair)), options.columns, options.again))
    }

    def work(pair: tuple[str, str]) -> dict[str, Any]:
        return check(*pair, due[pair])

    with tqdm(total=len(due), desc="Families", disable=not due) as bar:
        for pair, result in each(list(due), work, options.processes, options.seconds, options.gigabytes):
            before = known.get("/".join(pair), {}).get("columns", {})
            if isinstance(result, Failure) and before:
                result = {"mapping": pair[0], "type": pair[1], "columns": _failed(due[pair], str(result))}
            elif isinstance(result, Failure):
                result = {"mapping": pair[0], "type": pair[1], "built": str(result), "seconds": options.seconds}
            if "columns" in result:
                result["columns"] = {**before, **result["columns"]}
            record.add(result)
            bar.update()
            if not passed(result):
                bar.write(f"{'/'.join(pair)}: {failures(result)}")
    entries = {key: entry for key, entry in record.entries().items() if tuple(key.split("/", 1)) in set(chosen)}
    print(f"{sum(map(passed, entries.values()))} of {len(entries)} families passed, {len(chosen)} asked for")
    if options.only == "*" and len(entries) == len(chosen):
        (options.docs / "vision_families.md").write_text(page(entries))
    return 0


def _missing(entry: dict[str, Any] | None, columns: list[str], again: bool) -> list[str]:
    """What is to be looked at of a family."""
    if entry is None or "columns" not in entry:
        return columns if entry is None or again else []
    wrong = failures(entry) if again else {}
    return [name for name in columns if name not in entry["columns"] or name in wrong]


def _failed(columns: list[str], why: str) -> dict[str, Any]:
    return {name: Verdict("failed", why).to_dict() for name in columns}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="library/family, such as 'timm/vision*'")
    parser.add_argument("--columns", nargs="+", choices=list(COLUMNS), default=list(COLUMNS), help="what is looked at")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=180, help="that one family may take")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="that one family may take")
    parser.add_argument("--again", action="store_true", help="once more what did not pass")
    parser.add_argument("--fresh", action="store_true", help="forget what was found before")
    parser.add_argument("--record", type=Path, default=ROOT / "build" / "vision.jsonl")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
