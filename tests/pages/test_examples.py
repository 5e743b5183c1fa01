"""Runs the Python of the README and of the pages, each page from top to bottom, as a reader would.

Set-up that a reader does not need is in comments (``invisible-code-block``); what takes minutes is marked there as well, by
``skip: next`` and the reason. A page is one test, since its examples share their names.
"""

import re
from pathlib import Path
from unittest import SkipTest

import matplotlib
import pytest
from sybil import Sybil
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^ *```(\S*)$", re.MULTILINE)


def parsed(path: Path) -> Document:
    return Sybil([PythonCodeBlockParser(), SkipParser()], path=str(ROOT)).parse(path)


def run(document: Document) -> list[str]:
    """Runs all examples of a page and returns the reasons why some were not."""
    reasons = []
    for example in document.examples():
        try:
            example.evaluate()
        except SkipTest as skipped:
            reasons.append(str(skipped))
    return reasons


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what they write
    matplotlib.use("agg")
    run(parsed(path))


def test_what_is_not_run_is_rare_and_says_why() -> None:
    marks = [mark for path in PAGES for mark in re.findall(r"<!-- *skip: *(.*?) *-->", path.read_text())]
    assert len(marks) <= 3
    for mark in marks:
        assert re.fullmatch(r'next ".{20,}"', mark), f"say what is left out and why: {mark!r}"


def test_no_code_is_hidden_from_the_tests() -> None:
    """Code in a fence of another name, or of none, would be run by nobody."""
    for path in PAGES:
        opened = FENCE.findall(path.read_text())[::2]
        assert set(opened) <= {"python", "bash", "csv", "yaml", "text"}, path
        shown = sum(example.region.lexemes is not None for example in parsed(path).examples())
        assert shown >= opened.count("python"), path


def test_an_example_that_fails_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('<!-- skip: next "the reason" -->\n\n```python\n1 / 0\n```\n\n```python\nx = 1\n```\n')
    assert run(parsed(page)) == ["the reason"]
    page.write_text("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        run(parsed(page))
