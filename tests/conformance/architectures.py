"""Looks at every architecture that transformers has, by a tiny model of each, and says what holds of it.

    python tests/conformance/architectures.py                       # all; an hour of one core; goes on
    python tests/conformance/architectures.py --only 'llama*' --mapping causal-lm
    python tests/conformance/architectures.py --again               # once more what did not pass
    python tests/conformance/architectures.py --compare             # with what is stored; ends with 1 where something is worse

What is found is kept in build/architectures.jsonl, a line a type, for these versions of lrp-prune, torch and transformers
(``--fresh`` forgets it). A run over everything writes docs/architectures.md and docs/architectures.json, unless it compares;
``--page`` writes them before its end.
"""

import argparse
import signal
import sys
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))
from tests.conformance import page
from tests.conformance.checking import check
from tests.conformance.comparing import compared
from tests.conformance.record import ROOT, Record, code, failures, passed, versions
from tests.conformance.workers import Failure, each
from tests.support.architectures.mappings import MAPPINGS, pairs

COMMAND = "python tests/conformance/architectures.py"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = _options(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of what ends the processes
    chosen = pairs(options.mapping or None, options.only)
    record = Record(options.record)
    if options.fresh:
        record.clear()
    known = record.entries()
    missing = [pair for pair in chosen if _is_due(known.get("/".join(pair)), options.again)]
    if not options.page:
        _run(missing, record, options)
    found = {"/".join(pair): record.entries().get("/".join(pair)) for pair in chosen}
    entries = {key: entry for key, entry in found.items() if entry is not None}
    whole = len(chosen) == len(pairs())
    _tell(entries)
    if options.compare is not None:
        changes = compared(
            {key: entry for key, entry in page.read(options.compare).items() if whole or key in entries}, entries, whole
        )
        print(changes)
        return 1 if changes.worse else 0
    if whole:
        earlier = sum(entry.get("code") != code() for entry in entries.values())
        about = {"versions": versions(), "date": date.today().isoformat(), "command": COMMAND, "of": len(chosen)}
        about["earlier"] = earlier
        page.write(options.docs, entries, about)
    return 0


def _is_due(entry: dict[str, Any] | None, again: bool) -> bool:
    return entry is None or (again and not passed(entry))


def _run(missing: list[tuple[str, str]], record: Record, options: argparse.Namespace) -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the models are tiny, and processes are forked
    if missing:
        check("causal-lm", "llama")  # imports what all of them need, once
    with tqdm(total=len(missing), desc="Architectures", disable=not missing) as bar:
        for pair, result in each(missing, _checked, options.processes, options.seconds, options.gigabytes):
            mapping, name = pair
            if isinstance(result, Failure):
                result = {"mapping": mapping, "type": name, "built": str(result), "seconds": options.seconds}
            record.add(result)
            bar.update()
            if not passed(result):
                told = "; ".join(f"{column}: {why[:160]}" for column, why in failures(result).items())
                bar.write(f"{mapping}/{name}: {told}")


def _checked(pair: tuple[str, str]) -> dict[str, Any]:
    return check(*pair)


def _tell(entries: dict[str, dict[str, Any]]) -> None:
    for mapping, (good, built, number) in page.totals(entries).items():
        print(f"{mapping}: {good} passed / {built} built / {number}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="types, such as 'llama*', or 'ctc/*'")
    parser.add_argument("--mapping", nargs="+", choices=list(MAPPINGS), default=[], help="tasks")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=60, help="of the processor that one type may take")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of memory that one type may take")
    parser.add_argument("--again", action="store_true", help="once more what did not pass")
    parser.add_argument("--page", action="store_true", help="look at nothing, and write what is known so far")
    parser.add_argument("--fresh", action="store_true", help="forget what was found before")
    parser.add_argument("--record", type=Path, default=ROOT / "build" / "architectures.jsonl")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument(
        "--compare", type=Path, nargs="?", const=ROOT / "docs" / "architectures.json", metavar="JSON", default=None
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
