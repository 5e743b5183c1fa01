"""A run that goes on, whatever single types do; and what has changed since another."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conformance import architectures, page, record
from tests.conformance.comparing import compared
from tests.conformance.record import Entries, Record, failures, passed
from tests.conformance.workers import Failure, each


def _work(task: str) -> Any:
    if task == "hangs":
        time.sleep(60)
    if task == "goes on":
        while True:
            pass
    if task == "crashes":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "takes everything":
        return len(bytearray(2**33))
    if task == "is wrong":
        raise KeyError("nothing")
    return task.upper()


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("processes", [1, 2])
def test_what_hangs_or_crashes_is_a_result_and_no_end(processes: int) -> None:
    tasks = ["a", "hangs", "goes on", "crashes", "takes everything", "is wrong", "b"]
    began = time.monotonic()
    found = dict(each(tasks, _work, processes, seconds=1, gigabytes=1))
    assert time.monotonic() - began < 40
    assert found == {
        "a": "A",
        "hangs": "was not done after 10 s",
        "goes on": "took longer than 1 s of the processor",
        "crashes": "its process ended by SIGKILL",
        "takes everything": "MemoryError",
        "is wrong": "KeyError: 'nothing'",
        "b": "B",
    }
    assert all(isinstance(found[task], Failure) for task in tasks[1:6])


def _entry(key: str, *bad: str, built: str = "") -> dict[str, Any]:
    mapping, _, name = key.partition("/")
    entry: dict[str, Any] = {"mapping": mapping, "type": name}
    if built:
        return {**entry, "built": built}
    columns = {
        column: {"status": "failed", "why": f"wrong by 0.12{len(name)}"} if column in bad else {"status": "passed"}
        for column in ("forward", "conserves", "blocks")
    }
    return {**entry, "class": name.title(), "variants": ["eager"], "inputs": ["input_ids"], "columns": columns}


def _entries(*entries: dict[str, Any]) -> Entries:
    return {f"{entry['mapping']}/{entry['type']}": entry for entry in entries}


def test_a_record_goes_on_after_half_a_line_and_forgets_other_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(tmp_path / "new" / "record.jsonl")
    record.add(_entry("ctc/hubert", "forward"))
    record.add(_entry("ctc/sew"))
    record.add(_entry("ctc/hubert"))
    with (tmp_path / "new" / "record.jsonl").open("a") as file:
        file.write('{"mapping": "ctc", "ty')
    found = Record(tmp_path / "new" / "record.jsonl").entries()
    assert list(found) == ["ctc/hubert", "ctc/sew"] and passed(found["ctc/hubert"])
    monkeypatch.setattr("tests.conformance.record.version", lambda name: "0")
    assert Record(tmp_path / "new" / "record.jsonl").entries() == {}


def test_changes_are_told_by_type() -> None:
    stored = _entries(
        _entry("ctc/a"),
        _entry("ctc/b", "conserves"),
        _entry("ctc/c"),
        _entry("ctc/d", built="no"),
        _entry("ctc/e", "forward"),
    )
    found = _entries(
        _entry("ctc/a", "blocks"), _entry("ctc/b"), _entry("ctc/d", "forward"), _entry("ctc/e", built="bad"),
        _entry("ctc/f"), _entry("ctc/g", "conserves"),
    )  # fmt: skip
    changes = compared(stored, found)
    assert changes.worse == [
        "ctc/a fails in blocks: wrong by 0.121",
        "ctc/e fails in built: bad",
        "ctc/g (new) fails in conserves: wrong by 0.121",
        "ctc/c is gone",
    ]
    assert changes.better == ["ctc/b passes conserves", "ctc/d passes built"]
    assert changes.new == ["ctc/f (new)"]
    assert str(compared(stored, stored)) == "Nothing has changed."
    assert compared(stored, _entries(_entry("ctc/a")), whole=False).worse == []


def test_the_page_counts_and_names(tmp_path: Path) -> None:
    entries = _entries(
        _entry("ctc/hubert"), _entry("ctc/sew", "conserves"), _entry("causal-lm/gpt2", "conserves"),
        _entry("causal-lm/other", built="ImportError: no timm"),
    )  # fmt: skip
    about = {"versions": {"torch": "2"}, "date": "2026-01-02", "command": "python it", "of": 7}
    page.write(tmp_path, entries, about)
    text = (tmp_path / "architectures.md").read_text()
    assert page.totals(entries) == {"causal-lm": (0, 1, 2), "ctc": (1, 2, 2)}
    assert "| ctc | 1 | 2 | 2 | 2 | 1 |" in text and "| **all** | 1 | 3 | 4 | 3 | 1 |" in text
    assert "* `gpt2` (causal-lm), `sew` (ctc): wrong by 0.1" in text
    assert "* `other` (causal-lm): ImportError: no timm" in text
    assert "`python it`; 2026-01-02; torch 2. Of 7 types 4 were looked at so far. Every entry" in text
    page.write(tmp_path, entries, {**about, "of": 4, "earlier": 3})
    assert (
        "torch 2. 3 entries are of an earlier state of the library. Every"
        in (tmp_path / "architectures.md").read_text()
    )
    page.write(tmp_path, entries, about)
    stored = page.read(tmp_path / "architectures.json")
    assert {key: failures(entry) for key, entry in stored.items()} == {
        key: failures(entry) for key, entry in sorted(entries.items())
    }
    assert json.loads((tmp_path / "architectures.json").read_text())["about"] == about


@pytest.mark.parametrize(("bad", "code"), [((), 0), (("forward",), 1)])
def test_the_command_ends_with_1_where_something_is_worse(
    bad: tuple[str, ...], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is known already is not looked at again."""
    page.write(tmp_path, _entries(_entry("ctc/sew")), {"versions": {}, "date": "", "command": ""})
    Record(tmp_path / "record.jsonl").add(_entry("ctc/sew", *bad))
    arguments = ["--only", "ctc/sew", "--record", str(tmp_path / "record.jsonl"), "--docs", str(tmp_path / "none")]
    assert architectures.main([*arguments, "--compare", str(tmp_path / "architectures.json")]) == code
    printed = capsys.readouterr().out
    assert f"ctc: {1 - code} passed / 1 built / 1" in printed
    assert ("ctc/sew fails in forward: wrong by 0.123" in printed) == bool(code)
    assert not (tmp_path / "none").exists()


def test_a_page_says_which_entries_are_of_another_state_of_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, known = tmp_path / "record.jsonl", [("ctc", "hubert"), ("ctc", "sew")]
    monkeypatch.setattr(architectures, "pairs", lambda *_: known)
    monkeypatch.setattr(record, "code", lambda: "earlier")
    Record(path).add(_entry("ctc/sew"))
    monkeypatch.undo()
    monkeypatch.setattr(architectures, "pairs", lambda *_: known)
    Record(path).add(_entry("ctc/hubert"))
    assert architectures.main(["--page", "--record", str(path), "--docs", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "architectures.json").read_text())["about"]["earlier"] == 1


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.filterwarnings("ignore")
def test_the_command_looks_at_what_is_missing_or_did_not_pass(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    arguments = ["--only", "causal-lm/gpt2", "--record", str(path), "--docs", str(tmp_path)]
    Record(path).add(_entry("causal-lm/gpt2", "forward"))
    assert architectures.main(arguments) == 0
    assert failures(Record(path).entries()["causal-lm/gpt2"]) == {"forward": "wrong by 0.124"}
    assert architectures.main([*arguments, "--again"]) == 0
    entry = Record(path).entries()["causal-lm/gpt2"]
    assert passed(entry) and entry["class"] == "GPT2LMHeadModel"
    assert not (tmp_path / "architectures.md").exists()  # not all were looked at
