"""The page and the file that say what was found."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from tests.conformance.checking import COLUMNS
from tests.conformance.record import Entries, failures, passed
from tests.support.architectures.mappings import MAPPINGS

HEADINGS = {
    "forward": "values of the forward are bit for bit the same in the mode, as they are with or without gradients",
    "conserves": "CP-LRP conserves: relevance of all roots sums up to the value to 1e-4 of it, in float64, without biases",
    "attnlrp": "AttnLRP has a rule for every operation, and relevance is finite",
    "weights": "every prunable weight has relevance, or is named with the reason why not",
    "neurons": "hidden units and filters: one goes with what makes it and all that reads it; or they are refused by name",
    "heads": "attention heads, likewise",
    "blocks": "layers that write onto a residual stream, likewise",
    "prunes": "pruned to 50 % exactly, and zeros outlast a step of AdamW with decay",
    "loads": "the pruned model is saved, and loaded by `from_pretrained` alone, as it was",
}


def totals(entries: Entries) -> dict[str, tuple[int, int, int]]:
    """Mapping -> how many types passed everything, were built, and are there."""
    found = {}
    for mapping in MAPPINGS:
        own = [entry for entry in entries.values() if entry["mapping"] == mapping]
        found[mapping] = sum(map(passed, own)), sum("columns" in entry for entry in own), len(own)
    return {mapping: counts for mapping, counts in found.items() if counts[2]}


def write(folder: Path, entries: Entries, about: dict[str, Any]) -> None:
    """Write ``architectures.md`` and ``architectures.json``.

    Args:
        folder: of the pages.
        entries: what was found.
        about: versions, date and command; how many types there are, and how many entries are of an earlier state of the code.
    """
    entries = dict(sorted(entries.items()))
    kept = {key: _short(entry) for key, entry in entries.items()}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in kept.items())
    (folder / "architectures.json").write_text(f'{{"about": {json.dumps(about)},\n"entries": {{\n{lines}\n}}}}\n')
    (folder / "architectures.md").write_text(_page(entries, about))


def read(path: Path) -> Entries:
    """What :func:`write` stored."""
    found = json.loads(path.read_text())["entries"]
    return {
        key: {"mapping": key.partition("/")[0], "type": key.partition("/")[2], **entry} for key, entry in found.items()
    }


def _short(entry: dict[str, Any]) -> dict[str, Any]:
    """What is compared later, and figures."""
    if "columns" not in entry:
        return {"built": entry["built"]}
    return {
        "class": entry["class"],
        "variants": entry["variants"],
        "inputs": entry["inputs"],
        "columns": {
            name: {
                key: _rounded(value) for key, value in verdict.items() if key != "why" or verdict["status"] == "failed"
            }
            for name, verdict in entry["columns"].items()
        },
    }


def _rounded(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _page(entries: Entries, about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    whole = tuple(map(sum, zip(*totals(entries).values(), strict=True)))
    parts = [
        "# Architectures",
        "There is no code about any architecture in the library. Whether it works on those that `transformers` has is looked at "
        "by a tiny model of every type, with random weights, for each task that it has a class for:",
        "\n".join(f"* **{name}**: {what}" for name, what in HEADINGS.items()),
        "Of each with eager attention and with `scaled_dot_product_attention` where it has both, and of mixtures of experts with "
        "the grouped kernel in float32 as well; types whose own code does not run in float64, or computes something else in "
        "it, are in float32. A type passes if nothing is wrong in any column, in any of these. *None* counts as right: there "
        "is nothing of the kind to look at, or the library says by itself, with the reason, that it could not be taken out.",
        _table(entries, whole),
        f"`{about['command']}`; {about['date']}; {versions}. {_of_all(about, whole)}Every entry, with its figures, is in "
        "[architectures.json](architectures.json).",
        "## What does not pass",
        _exceptions(entries),
        "## What is not built",
        _not_built(entries),
    ]
    text = [key for key, entry in entries.items() if _is_text_alone(entry)]
    if text:
        parts.append(f"Given text alone, since no images were found that they accept: {_named(text)}.")
    return "\n\n".join(parts) + "\n"


def _of_all(about: dict[str, Any], whole: tuple[int, ...]) -> str:
    """What is said of a run that was written before its end, and of one that goes on from another state of the library."""
    number, earlier = about.get("of", whole[2]), about.get("earlier", 0)
    so_far = f"Of {number} types {whole[2]} were looked at so far. " if whole[2] < number else ""
    return so_far + (f"{earlier} entries are of an earlier state of the library. " if earlier else "")


def _table(entries: Entries, whole: tuple[int, ...]) -> str:
    head = ["task", "passed", "built", "all", *COLUMNS]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for mapping, counts in totals(entries).items():
        own = [entry for entry in entries.values() if entry["mapping"] == mapping]
        rows.append([mapping, *map(str, counts), *(_counted(own, name) for name in COLUMNS)])
    rows.append(["**all**", *map(str, whole), *(_counted(list(entries.values()), name) for name in COLUMNS)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _counted(entries: list[dict[str, Any]], column: str) -> str:
    """How many are right, and of how many of these there is nothing of the kind, or the library says that it does not do it."""
    found = Counter(entry["columns"][column]["status"] for entry in entries if column in entry.get("columns", ()))
    less = found["refused"] + found["absent"]
    return f"{found['passed'] + less}{f' ({less} none)' if less else ''}"


def _exceptions(entries: Entries) -> str:
    """By column, then by reason, the types that have it."""
    parts = []
    for column in COLUMNS:
        reasons: dict[str, list[str]] = {}
        for key, entry in entries.items():
            if "columns" in entry and column in failures(entry):
                reasons.setdefault(_reason(failures(entry)[column]), []).append(key)
        if reasons:
            parts.append(f"**{column}**: {HEADINGS[column]}")
            parts.append("\n".join(f"* {_named(keys)}: {why}" for why, keys in _most_first(reasons)))
    return "\n\n".join(parts) or "Everything passes."


def _not_built(entries: Entries) -> str:
    reasons: dict[str, list[str]] = {}
    for key, entry in entries.items():
        if "columns" not in entry:
            reasons.setdefault(_reason(entry["built"]), []).append(key)
    return "\n".join(f"* {_named(keys)}: {why}" for why, keys in _most_first(reasons)) or "All are."


def _is_text_alone(entry: dict[str, Any]) -> bool:
    """Whether a model of images and text was tried on text."""
    known = entry["mapping"] == "image-text-to-text" and "columns" in entry
    return known and not any("pixel" in name or "patches" in name for name in entry["inputs"])


def _most_first(reasons: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    return sorted(reasons.items(), key=lambda item: -len(item[1]))


def _named(keys: list[str]) -> str:
    """Types, each with the tasks of it."""
    tasks: dict[str, list[str]] = {}
    for key in keys:
        mapping, _, name = key.partition("/")
        tasks.setdefault(name, []).append(mapping)
    return ", ".join(f"`{name}` ({', '.join(mappings)})" for name, mappings in tasks.items())


def _reason(why: str) -> str:
    """A reason without what differs from type to type: names of layers, and figures of the same order."""
    why = re.sub(r"\b[\w.]*\.\d+\.[\w.]+", "a layer", why)
    why = re.sub(r"\bunit \d+ of [\w.]+", "a unit", why)
    why = re.sub(r"\d\.?\d*e[-+]\d+|\d+\.\d+", lambda match: _magnitude(float(match[0])), why)
    return re.sub(r"[<>|]", "", why)[:300]


def _magnitude(figure: float) -> str:
    return f"{figure:.0e}" if figure and figure < 1e-3 else f"{figure:.1g}"
